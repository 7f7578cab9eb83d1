"""Push an exported folder to the Hugging Face hub, by huggingface_hub.

The token is the one from `hf auth login`, or HF_TOKEN; HF_ENDPOINT names another hub. All of this
is left to that library, which reads them itself.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import DecantError, ParamsError, reason_of
from pipeline.io.ownership import MARK


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Return name and size in bytes of each file that would be uploaded, sorted by name."""
    files = (file for file in sorted(folder.iterdir()) if file.name != MARK)
    return [(file.name, file.stat().st_size) for file in files]


def require_repo_id(repo_id: str) -> None:
    """Refuse anything that is not a repository name, ORG/NAME.

    Raises:
        ParamsError: it is not such a name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
        well_formed = repo_id.count("/") == 1
    except HFValidationError:
        well_formed = False
    if not well_formed:
        raise ParamsError(
            f"--push {repo_id} is no name on the hub: give ORG/NAME, of letters, digits, '-', '_' "
            "and '.'"
        )


def push(folder: Path, repo_id: str, *, public: bool) -> str:
    """Upload every file of a folder to a model repository, creating it if needed; return its URL.

    Args:
        public: whether a new repository is visible to all; an existing one keeps its visibility.

    Raises:
        DecantError: there is no token, no permission, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[name for name, _ in files_of(folder)],
            commit_message="Export by Decant",
        )
    except Exception as error:  # HTTP, authentication and connection errors from three libraries
        reason = reason_of(error, 300)
        raise DecantError(
            f"{folder} could not be pushed to {repo_id} ({reason}): check the connection, the "
            "name, and the token that `hf auth login` or HF_TOKEN gives, and push again"
        ) from error
    return str(address)
