"""Describe what a corpus is made from, so that the stage can see whether there is anything to do.

stages/corpus.py compares `source.json` in the corpus with what it would be now: parameters, hashes
of the text, the tokenizer's files, and the code that makes rows of them. DVC does the same by way
of pipeline/inputs.py.

If the only difference is more text (`has_grown`), the stage adds rows to the corpus. `source.json`
then also has `earlier`: the files, [name, sha256], from which rows were made and that the present
source no longer names. While an append is being committed it has `adding`: the source with which
the corpus will be complete. A process that is killed then may leave new rows in one split and not
in the other. Each split is whole, and a later append adds what is missing; until then the corpus is
not taken for one that was made from either source.

A corpus that stages/convert.py has imported has `imported_from`, the name of a format, with what
`pipeline/interchange/import_cache.py` needs to know it again. One that stages/rollouts.py has made
has `rollouts`, what the rollouts depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.source_params import CorpusParams, TextSource
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit, read_made_from
from pipeline.data.sources import find_files, matching_files, stdlib_files
from pipeline.errors import DecantError, ParamsError
from pipeline.io.address import Address
from pipeline.io.folders import open_folder
from pipeline.io.hashes import hash_changed, hash_file
from pipeline.io.hub import commit_of
from pipeline.model.folder import POINTER, TOKENIZER_FILES

EARLIER, ADDING = "earlier", "adding"
_FIXED = (
    "row_length",
    "packing",
    "loss_on",
    "add_bos",
    "max_document_tokens",
    "validation_fraction",
)
"""Parameters that an append cannot change: the rows that are there were made with them."""

_HERE = Path(__file__).parent
_CODE = (*_HERE.glob("*.py"), *(_HERE.parent / "model").glob("tokenizer.py"))


def made_from(
    params: CorpusParams, teacher: Path, address: Address, seen: Path | None = None
) -> dict[str, Any]:
    """Describe what the corpus at `address` would be made from now.

    Text that no longer exists is assumed to be unchanged: on a machine that only has the corpus,
    none of the text can have changed.

    Args:
        seen: see `hash_changed`.

    Raises:
        DecantError: the text does not exist, and no corpus was made from it.
    """
    before = read_made_from(address)
    tokenizer = [teacher / name for name in TOKENIZER_FILES if (teacher / name).exists()]
    code = b"".join(file.read_bytes() for file in sorted(_CODE))
    return {
        "corpus": _read_values(params),
        "text": text_made_from(params, _object(before.get("text")), seen),
        "tokenizer": [[Path(name).name, h] for name, h in hash_changed(tokenizer, None).items()],
        "code_sha256": hashlib.sha256(code).hexdigest(),
    }


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_values(params: TextSource) -> dict[str, Any]:
    """The parameters without the sections of other sources."""
    if not isinstance(params, CorpusParams):
        return params.model_dump(mode="json", exclude={"files", "hub"} - {params.source})
    if not params.sources:
        others = {"files", "hub", "sources"} - {params.source}
        return params.model_dump(mode="json", exclude=others)
    values = params.model_dump(mode="json", exclude={"source", "files", "hub", "sources"})
    return values | {"sources": [_read_values(source) for source in params.sources]}


def text_made_from(
    params: CorpusParams, before: Mapping[str, Any], seen: Path | None
) -> dict[str, Any]:
    """Return the source of the text, and what stands for its bytes: hashes, or a commit on the hub.

    Args:
        before: what this returned the last time, which holds for text that has gone since.
        seen: see `hash_changed`.

    Raises:
        DecantError: the text is not there, or the hub cannot be reached.
    """
    sources = params.text_sources
    names = [_names(source) for source in sources]
    if params.sources:
        known_of = zip(_list(before.get("named")), _list(before.get("sha256")), strict=False)
    else:
        known_of = zip([before.get("named")], [before.get("sha256")], strict=True)
    known = {json.dumps(name): sha256 for name, sha256 in known_of}
    found = _stand_ins(sources, [known.get(json.dumps(name)) for name in names], seen)
    if params.sources:
        return {"named": names, "sha256": found}
    return {"named": names[0], "sha256": found[0]}


def _names(source: TextSource) -> dict[str, Any]:
    section = getattr(source, source.source, None)
    return {"source": source.source, **(section.model_dump(mode="json") if section else {})}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _stand_ins(sources: Sequence[TextSource], known: Sequence[Any], seen: Path | None) -> list[Any]:
    """Return what stands for the bytes of each source."""
    files = [
        _files(source, stand_in) if source.source == "files" else []
        for source, stand_in in zip(sources, known, strict=True)
    ]
    # All at once, since `seen` records one call.
    hashes = hash_changed((Path(file) for names in files for file in names), seen)
    return [
        [[name, hashes[name]] for name in dict.fromkeys(str(Path(file)) for file in names)]
        if names
        else _stand_in(source, stand_in)
        for source, names, stand_in in zip(sources, files, known, strict=True)
    ]


def _files(source: TextSource, known: Any) -> list[str]:
    """Return the files of a source; none if they have gone since it was read."""
    here = any(matching_files(p) or Path(p).exists() for p in source.files.paths)
    return [] if known is not None and not here else find_files(source.files.paths)


def _stand_in(source: TextSource, known: Any) -> Any:
    if source.source == "hub":
        return commit_of(
            source.hub.id,
            source.hub.revision,
            kind="dataset",
            named="corpus.hub.revision",
            otherwise=known,
        )
    if source.source == "files":
        return known
    digest = hashlib.sha256()
    for file in stdlib_files():
        digest.update(bytes.fromhex(hash_file(file)))
    return digest.hexdigest()


def is_there(address: Address) -> bool:
    """Return whether there is a corpus that its readers can open."""
    try:
        return all(len(CorpusSplit(address, split)) for split in SPLITS)
    except DecantError:
        return False


def write_made_from(address: Address, content: dict[str, Any]) -> None:
    """Record what a corpus was made from, once it is complete."""
    open_folder(address).write(POINTER, (json.dumps(content, indent=2) + "\n").encode())


def is_same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether a complete corpus was made from the present source."""
    return {name: value for name, value in before.items() if name != EARLIER} == now


def has_grown(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether what is new in the present source can be added to the rows that are there.

    It can if all files are there as they were, and more of them, or if a split may have more
    tokens; the document at which a split was cut stays cut. corpus.max_bad_documents has no effect
    on rows.
    """
    earlier = _as_files(before.get(EARLIER)) or {}
    return (
        _is_part(before, now)
        and (ADDING not in before or _is_part(_object(before[ADDING]), now))
        and all(earlier.get(name, sha256) == sha256 for name, sha256 in _files_of(now))
    )


def _is_part(before: dict[str, Any], now: dict[str, Any]) -> bool:
    if not before or _without_growth(before) != _without_growth(now):
        return False
    for name in ("train_tokens", "validation_tokens"):
        was, may = before["corpus"].get(name), now["corpus"][name]
        if may is not None and (was is None or was > may):
            return False
    for was, may in zip(_stand_ins_of(before), _stand_ins_of(now), strict=True):
        old, new = _as_files(was), _as_files(may)
        if was != may and (old is None or new is None or not old.items() <= new.items()):
            return False
    return True


def _sources_of(source: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what names each source of the text."""
    named = _object(source.get("text")).get("named")
    return [_object(name) for name in (named if isinstance(named, list) else [named])]


def _stand_ins_of(source: dict[str, Any]) -> list[Any]:
    """Return what stands for the bytes of each source."""
    text = _object(source.get("text"))
    sha256 = text.get("sha256")
    return _list(sha256) if isinstance(text.get("named"), list) else [sha256]


def _files_of(source: dict[str, Any]) -> list[tuple[str, str]]:
    """Return name and sha256 of all files of the text."""
    return [entry for found in _stand_ins_of(source) for entry in (_as_files(found) or {}).items()]


def _as_files(value: object) -> dict[str, str] | None:
    """Return the sha256 of each file, by its name; None if the text is not files."""
    if not isinstance(value, list):
        return None
    try:
        return {str(name): str(sha256) for name, sha256 in value}
    except (TypeError, ValueError):
        return None


def _without_growth(source: dict[str, Any]) -> dict[str, Any]:
    """Leave out what differs between a corpus and one that it grows to."""
    corpus = _object(source.get("corpus"))
    grows = ("train_tokens", "validation_tokens", "max_bad_documents", "files", "sources")
    weights = [_object(one).get("weight") for one in _list(corpus.get("sources"))]
    return {
        **{name: value for name, value in source.items() if name not in (EARLIER, ADDING)},
        "corpus": {name: value for name, value in corpus.items() if name not in grows},
        "text": [
            {name: value for name, value in names.items() if name != "paths"}
            for names in _sources_of(source)
        ],
        "weights": weights,
        "num_stand_ins": len(_stand_ins_of(source)),
    }


def require_appendable(address: Address, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to add rows to a corpus whose rows were made in another way.

    Raises:
        ParamsError: a parameter or the tokenizer differs; the message names it.
        DecantError: there is no corpus, or nothing says how it was made.
    """
    if not is_there(address):
        raise DecantError(
            f"--append adds rows to a corpus, and {address} holds none: run stages/corpus.py "
            "without it"
        )
    made_by = _object(before.get("corpus"))
    if not made_by:
        raise DecantError(
            f"{address} has no {POINTER} that says how its rows were made, so none can be added: "
            "run stages/corpus.py --overwrite"
        )
    remedy = "or rebuild the corpus by stages/corpus.py --overwrite"
    for name in _FIXED:
        if (was := made_by.get(name)) != (wanted := now["corpus"][name]):
            raise ParamsError(
                f"--append cannot add rows of corpus.{name}={_yaml(wanted)} to {address}, whose "
                f"rows were made with {_yaml(was)}: set that again, {remedy}"
            )
    was, wanted = (_as_files(source.get("tokenizer")) or {} for source in (before, now))
    for name in sorted(was.keys() | wanted.keys()):
        if was.get(name) != wanted.get(name):
            raise ParamsError(
                f"--append cannot add rows to {address} with another tokenizer (the teacher's "
                f"{name} differs): restore that file, {remedy}"
            )


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def begin_append(address: Address, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Record what is about to be added to a corpus."""
    base = {name: value for name, value in before.items() if name != ADDING}
    write_made_from(address, base | {EARLIER: earlier_files(before, now), ADDING: now})


def earlier_files(before: dict[str, Any], now: dict[str, Any]) -> list[list[str]]:
    """List the files from which rows may have been made and that are not in the present source."""
    known = {*(_as_files(before.get(EARLIER)) or {}).items(), *_files_of(before)}
    known |= {*_files_of(_object(before.get(ADDING)))}
    return [list(entry) for entry in sorted(known - {*_files_of(now)})]
