"""Describe what a corpus is made from, so that the stage can see whether there is anything to do.

stages/corpus.py compares `source.json` in the corpus with what it would be now: parameters, hashes
of the text, the tokenizer's files, and the code that makes rows of them. DVC does the same by way
of pipeline/inputs.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.source_params import CorpusParams, TextSource
from pipeline.data.corpus_zarr import SPLITS, CorpusSplit
from pipeline.data.sources import find_files, matching_files, stdlib_files
from pipeline.errors import DecantError
from pipeline.io.address import Address
from pipeline.io.folders import open_folder
from pipeline.io.hashes import hash_changed, hash_file
from pipeline.io.hub import commit_of
from pipeline.model.folder import POINTER, TOKENIZER_FILES

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


def read_made_from(address: Address) -> dict[str, Any]:
    """Read the `source.json` of a corpus; empty if there is none that can be read."""
    try:
        return _object(json.loads(open_folder(address).read(POINTER)))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}


def is_there(address: Address) -> bool:
    """Return whether there is a corpus that its readers can open."""
    try:
        return all(len(CorpusSplit(address, split)) for split in SPLITS)
    except DecantError:
        return False


def write_made_from(address: Address, content: dict[str, Any]) -> None:
    """Record what a corpus was made from, once it is complete."""
    open_folder(address).write(POINTER, (json.dumps(content, indent=2) + "\n").encode())
