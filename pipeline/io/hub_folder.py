"""Folders in dataset repositories of the Hugging Face hub, which are only read.

huggingface_hub downloads each file once, whole, into its cache on disk (HF_HOME), and it is read
there from then on, also without a network (HF_HUB_OFFLINE=1). The revision is resolved to a commit,
and the commit's files are listed, once per process, so that a process reads one state of the
repository even if more is pushed meanwhile. The token is the one from `hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.errors import DecantError, ParamsError, accident, reason_of
from pipeline.io.address import Address, HubUrl
from pipeline.io.retries import GaveUpError, with_retries
from pipeline.runtime.console import say

CARD = "README.md"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SERVER_ERROR = 500  # the first HTTP status that another attempt may change


@dataclass(frozen=True)
class _Snapshot:
    """A commit of a dataset repository."""

    commit: str
    folder: Path  # in the hub's cache on disk; holds what has been downloaded
    sizes: dict[str, int]  # bytes of each file, by its path


class HubFolder:
    """A folder of a dataset repository at one commit.

    Raises:
        DecantError: the repository cannot be reached, or has no such revision.
    """

    def __init__(self, url: HubUrl) -> None:
        self._url = url
        self._repo_id, revision, folder = url.parts
        self._prefix = f"{folder}/" if folder else ""
        self._snapshot = _snapshot(self._repo_id, revision)

    def read(self, key: str) -> bytes:
        path = self._prefix + key
        if path not in self._snapshot.sizes:
            raise FileNotFoundError(f"{self._url}/{key}")
        file = self._snapshot.folder / path
        return (file if file.exists() else self._download(path)).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        raise ParamsError(_read_only(self._url))

    def create(self, key: str, data: bytes) -> bool:
        raise ParamsError(_read_only(self._url))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        below = f"{self._prefix}{prefix}/" if prefix else self._prefix
        return {
            path.removeprefix(self._prefix): size
            for path, size in self._snapshot.sizes.items()
            if path.startswith(below)
        }

    def remove(self, prefix: str = "") -> None:
        raise ParamsError(_read_only(self._url))

    def _download(self, path: str) -> Path:
        from huggingface_hub import hf_hub_download

        def request() -> str:
            return hf_hub_download(
                self._repo_id, path, repo_type="dataset", revision=self._snapshot.commit
            )

        try:
            return Path(with_retries(request, _may_pass))
        except GaveUpError as error:
            raise DecantError(
                f"{self._url}/{path.removeprefix(self._prefix)} could not be downloaded, on "
                f"attempt {error.number} "
                f"({reason_of(error.reason)}): check the connection, or first download all of it "
                f"where there is one by `hf download {self._url}/`"
            ) from error.reason


def require_writable(address: Address, *, key: str) -> None:
    """Refuse an address on the hub, for a stage that writes there.

    Args:
        key: the parameter that holds the address, for the error.

    Raises:
        ParamsError: the address is on the hub.
    """
    if isinstance(address, HubUrl):
        raise ParamsError(f"{key}={_read_only(address)}")


def remedy_for_damage(address: Address, command: str) -> str:
    """Return what to do about a damaged folder: the command, unless the folder is on the hub."""
    if not isinstance(address, HubUrl):
        return command
    return (
        f"download it again by `hf download {address}/ --force-download`, and if that does not "
        "help name another revision after an @"
    )


def remedy_for_absence(address: Address, command: str) -> str:
    """Return what to do where there is no corpus or cache: the command, unless it is the hub."""
    if not isinstance(address, HubUrl):
        return command
    return (
        "name a repository that `share` made, and after an @ a revision that holds it; a push "
        "that is under way makes it appear when it ends"
    )


def _read_only(url: HubUrl) -> str:
    return f"{url} is on the hub and only read: name a folder, s3:// or gs:// to write to"


def _may_pass(error: Exception) -> bool | None:
    """Return whether a failed download may be repeated; None for a disk that is full or failing."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if accident(error):
        return None
    if isinstance(error, LocalEntryNotFoundError):  # raised after attempts of the library's own
        return False
    return not isinstance(error, HfHubHTTPError) or error.response.status_code >= _SERVER_ERROR


@cache
def _snapshot(repo_id: str, revision: str) -> _Snapshot:
    """Resolve a revision and list its files: by the hub, or without a network by its cache.

    snapshot_download keeps both in the cache; of the files only the card is downloaded.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()  # one for each file
    try:
        folder = Path(
            snapshot_download(
                repo_id, repo_type="dataset", revision=revision, allow_patterns=[CARD]
            )
        )
        commit = folder.name
        files = get_cached_repo_tree(repo_id, repo_type="dataset", revision=commit)
    except Exception as error:  # several libraries raise their own for HTTP, SSL and offline mode
        if accident(error):
            raise
        raise DecantError(
            f"revision {revision} of the dataset repository {repo_id} could not be opened "
            f"({reason_of(error)}): check both names, the connection, and for a private repository "
            "the token that `hf auth login` or HF_TOKEN gives"
        ) from error
    if not _COMMIT.fullmatch(revision):
        say(f"hub: reads {repo_id} at commit {commit}, which {revision} names now")
    return _Snapshot(commit, folder, {file.path: file.size for file in files})
