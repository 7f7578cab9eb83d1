"""One export: folder, GGUF files and card, written atomically, then the check.

<paths.export>/<name>/                a Hugging Face folder, with README.md
<paths.export>/<name>/<name>-f16.gguf one file for each format in export.gguf
<paths.export>/check.json             result of the last export's check (pipeline/export/check.py)
"""

from __future__ import annotations

from pathlib import Path

from pipeline.config.params import Params
from pipeline.export.card import card_license, folder_card, run_card, run_facts
from pipeline.export.check import check_export
from pipeline.export.check_result import ExportCheck
from pipeline.export.gguf_models import require_convertible
from pipeline.export.source import Exported, text_to_check_by
from pipeline.export.to_gguf import require_gguf, write_gguf
from pipeline.export.to_huggingface import write_huggingface
from pipeline.io.files import write_json, write_text
from pipeline.io.ownership import atomic_folder
from pipeline.runtime.console import announce, readable_bytes
from pipeline.runtime.device import DTYPES


def export_model(params: Params, model: Exported) -> Path:
    """Write <paths.export>/<name>, replacing an older export; return its path.

    check.json is removed with the replaced folder, because it describes that one.

    Raises:
        DecantError: the model or its tokenizer cannot be exported, or a package is missing.
    """
    if params.export.gguf:  # fail before minutes are spent
        require_gguf()
        require_convertible(model.folder)
    folder = params.paths.export / model.name
    kinds = ", ".join((params.export.dtype, *params.export.gguf))
    size = sum(file.stat().st_size for file in model.folder.glob("*.safetensors"))
    announce(
        "export",
        f"writes {model.name}, {readable_bytes(size)} of weights, as {kinds}, then checks each by "
        f"{params.export.prompts} prompts of {params.export.max_new_tokens} new tokens",
    )
    files = gguf_files(params, model)
    license_id = run_facts(params, model.run).license if model.run else card_license(model.folder)
    with atomic_folder(folder, "export", key="paths.export") as partial:
        write_huggingface(model.folder, partial, DTYPES[params.export.dtype])
        for kind, file in files.items():
            write_gguf(partial, partial / file.name, kind, name=model.name, license_id=license_id)
        names = [file.name for file in files.values()]
        card = (
            run_card(params, model.run, names)
            if model.run
            else folder_card(model.folder, model.name, names)
        )
        write_text(partial / "README.md", card)
        (params.paths.export / "check.json").unlink(missing_ok=True)
    return folder


def gguf_files(params: Params, model: Exported) -> dict[str, Path]:
    """Return the path of each GGUF file, by format."""
    folder = params.paths.export / model.name
    return {kind: folder / f"{model.name}-{kind}.gguf" for kind in params.export.gguf}


def check_model(params: Params, model: Exported) -> ExportCheck:
    """Check the result of `export_model`, and write <paths.export>/check.json.

    Raises:
        DecantError: there is no text for the check, or a part cannot be loaded.
    """
    check = check_export(
        model.name,
        model.folder,
        params.paths.export / model.name,
        gguf_files(params, model),
        text_to_check_by(params, model.folder),
        params.export,
    )
    write_json(params.paths.export / "check.json", {"passed": check.passed, **vars(check)})
    return check
