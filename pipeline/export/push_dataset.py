"""Push a corpus and its cache to a dataset repository of the Hugging Face hub.

A small push is one commit, so readers see it all at once. A larger one takes several: the first one
removes the metadata of all groups and the last one writes it, so that whoever reads the branch
between them finds no cache, rather than parts of two; whoever reads a commit is not affected. A
push that was interrupted is completed by the same command: files that the branch holds already are
left out, and the hub keeps what was uploaded but not committed.

Token and endpoint are as for the push of a model (pipeline/export/push.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import DecantError, accident, reason_of
from pipeline.export.shared_files import GROUPS, TOKENIZER, SharedFile
from pipeline.io.address import HUB_FOLDERS
from pipeline.io.hub_folder import CARD
from pipeline.runtime.console import progress

MANY_FILES, MANY_ENTRIES = 100_000, 10_000
"""Files of a repository and entries of a folder above which the hub's documentation warns."""
_FILES_PER_COMMIT = 500
_BYTES_PER_COMMIT = 256 * 2**20  # the contents of a commit's files are in memory
_OURS = (*HUB_FOLDERS.values(), TOKENIZER)
"""The folders of the repository whose other files are removed."""


@dataclass(frozen=True)
class Pushed:
    """The result of a push."""

    url: str
    commit: str
    sent: int  # number of files; the others were there already


def push_dataset(
    files: Mapping[str, SharedFile], card: str, repo_id: str, *, public: bool
) -> Pushed:
    """Upload files and card to a dataset repository, creating it if needed.

    Other files in our folders of the repository are removed; the rest of it stays.

    Args:
        public: whether a new repository is visible to all; an existing one keeps its visibility.

    Raises:
        DecantError: there is no token, no permission, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()  # ours counts the commits
    api = HfApi()
    try:
        url = api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
        head = str(api.repo_info(repo_id, repo_type="dataset").sha)
        tree = api.list_repo_tree(repo_id, repo_type="dataset", revision=head, recursive=True)
        there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        new = [path for path, file in files.items() if not _is_same(there.get(path), file)]
        commits = list(_commits(files, new, there))
        for number, commit in enumerate(progress(commits, what="push", unit="commit"), 1):
            contents = {path: files[path].read() for path in commit.added}
            if number == len(commits):
                contents[CARD] = card.encode()
            part = f" ({number} of {len(commits)})" if len(commits) > 1 else ""
            made = api.create_commit(
                repo_id,
                _operations(contents, commit.removed),
                commit_message=f"Corpus and cache by Decant{part}",
                repo_type="dataset",
                parent_commit=head,
            )
            head = str(made.oid)
    except DecantError:
        raise
    except Exception as error:  # HTTP, authentication and connection errors from three libraries
        if accident(error):
            raise
        reason = reason_of(error, 300)
        raise DecantError(
            f"corpus and cache could not be pushed to {repo_id} ({reason}): check the connection, "
            "the name, and the token that `hf auth login` or HF_TOKEN gives, and push again, which "
            "continues"
        ) from error
    return Pushed(str(url), head, len(new))


@dataclass(frozen=True)
class _Commit:
    """Paths that a commit adds, and that it removes."""

    added: list[str]
    removed: list[str]


def _commits(
    files: Mapping[str, SharedFile], new: list[str], there: Mapping[str, Any]
) -> Iterator[_Commit]:
    """Divide the changes among commits, of which only the last one makes a cache appear."""
    stale = [path for path in there if path.split("/")[0] in _OURS and path not in files]
    batches = list(_batches(files, new))
    if len(batches) < 2:
        yield _Commit(new, stale)
        return
    groups = [path for path in GROUPS if path in there]
    for batch in _batches(files, [path for path in new if path not in GROUPS]):
        yield _Commit(batch, [*stale, *groups])
        stale = groups = []
    yield _Commit(list(GROUPS), [])


def _batches(files: Mapping[str, SharedFile], paths: list[str]) -> Iterator[list[str]]:
    """Divide paths into batches of bounded number and size."""
    batch: list[str] = []
    size = 0
    for path in paths:
        if len(batch) == _FILES_PER_COMMIT or size + files[path].size > _BYTES_PER_COMMIT:
            if batch:
                yield batch
            batch, size = [], 0
        batch.append(path)
        size += files[path].size
    if batch:
        yield batch


def _is_same(entry: Any, file: SharedFile) -> bool:
    """Return whether the repository has the same contents; they are read only if the size fits.

    Large files have their sha256 there, others git's hash of them.
    """
    if entry is None or entry.size != file.size:
        return False
    data = file.read()
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == hashlib.sha256(data).hexdigest())
    return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


def _operations(contents: Mapping[str, bytes], removed: list[str]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    deletions = [CommitOperationDelete(path_in_repo=path) for path in removed]
    additions = [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=data)
        for path, data in contents.items()
    ]
    return [*deletions, *additions]
