"""An exported folder to the Hugging Face hub, by huggingface_hub.

The token is the one that `hf auth login` left, or HF_TOKEN; HF_ENDPOINT names another hub. All is
left to that library, which reads them itself.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import DecantError, ParamsError
from pipeline.storage import MARK


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Name and bytes of each file that would go, in order of names."""
    files = (file for file in sorted(folder.iterdir()) if file.name != MARK)
    return [(file.name, file.stat().st_size) for file in files]


def require_repo_id(repo_id: str) -> None:
    """Refuse what is no name of a repository: ORG/NAME.

    Raises:
        ParamsError: it is not.
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
    """Upload every file of a folder into a model repository, made if need be; returns its address.

    Args:
        public: visible to all; a repository that exists already keeps what it is.

    Raises:
        DecantError: no token, no permission, or the hub cannot be reached.
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
    except Exception as error:  # HTTP, authentication and connection errors of three libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DecantError(
            f"{folder} could not be pushed to {repo_id} ({reason}): check the connection, the "
            "name, and the token that `hf auth login` or HF_TOKEN gives, and push again"
        ) from error
    return str(address)
