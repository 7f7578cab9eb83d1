"""The model to export, and the text that the export is checked with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.params import Params
from pipeline.data.corpus_zarr import CorpusSplit
from pipeline.data.packing import PADDING
from pipeline.errors import MismatchError, ParamsError
from pipeline.model.folder import hash_tokenizer, teacher_folder
from pipeline.model.named_models import model_folder
from pipeline.model.tokenizer import load_tokenizer

_ROWS_AT_ONCE = 256
_CHARACTERS_A_PROMPT = 1000


@dataclass(frozen=True)
class Exported:
    """A model to export: its name, its folder, and the run that made it, if one did."""

    name: str
    folder: Path
    run: str | None


def find_model(params: Params, run: str, model: Path | None) -> Exported:
    """Return the model of a run, or of a folder.

    Raises:
        DecantError: there is no such model.
        ParamsError: the run's name is not valid, or the export would overwrite its own source.
    """
    folder = model_folder(params.paths.runs, run, model)
    if model is None:
        return Exported(run, folder, run)
    name = folder.resolve().name
    if name == "model":  # the model of a run elsewhere
        name = folder.resolve().parent.name
    if (params.paths.export / name).resolve() == folder.resolve():
        raise ParamsError(
            f"--model {model} is an export already, and would be replaced by itself: name the "
            "folder that it was made of, or another place in paths.export"
        )
    return Exported(name, folder, None)


def text_to_check_by(params: Params, model: Path) -> str:
    """Return export.text, or as many of the corpus's validation documents as the check needs.

    Raises:
        MismatchError: the tokenizer that made the corpus cannot be found.
        ParamsError: export.text cannot be read.
    """
    if params.export.text is not None:
        try:
            return params.export.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ParamsError(
                f"export.text={params.export.text} cannot be read as UTF-8 text ({error}): name "
                "another file, or null"
            ) from None
    corpus = CorpusSplit(params.paths.corpus, "validation")
    tokenizer = _tokenizer_of(corpus, (model, teacher_folder(params.paths.teacher)))
    text, wanted = "", params.export.prompts * _CHARACTERS_A_PROMPT
    for start in range(0, len(corpus), _ROWS_AT_ONCE):
        rows = corpus.rows(start, min(start + _ROWS_AT_ONCE, len(corpus)))
        text += _decode(tokenizer, rows.tokens[rows.doc_ids != PADDING].tolist())
        if len(text) >= wanted and len(text.splitlines()) >= 2 * params.export.lines:
            break
    return text


def _tokenizer_of(corpus: CorpusSplit, folders: tuple[Path, ...]) -> Any:
    """Load the tokenizer that the corpus was made with."""
    wanted = corpus.info.tokenizer_sha256
    for folder in folders:
        if (folder / "tokenizer.json").exists() and hash_tokenizer(folder) == wanted:
            return load_tokenizer(folder)
    raise MismatchError(
        f"{corpus.path} was made by tokenizer {wanted[:12]}, which none of "
        f"{', '.join(map(str, folders))} holds: name a text to check by in export.text"
    )


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
