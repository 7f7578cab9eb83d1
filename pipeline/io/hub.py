"""Resolve revisions of repositories on the Hugging Face hub to commits."""

from __future__ import annotations

import re

from pipeline.errors import DecantError, reason_of

_COMMIT = re.compile(r"[0-9a-f]{40}")


def commit_of(
    hub_id: str, revision: str, *, kind: str, named: str, otherwise: str | None = None
) -> str:
    """Return the commit that a revision names.

    A commit names itself; the hub is asked for the current commit of a branch or tag.

    Args:
        kind: "model" or "dataset".
        named: the parameter that holds `revision`, for the error.
        otherwise: the commit found the last time, returned if the hub cannot be reached.

    Raises:
        DecantError: the hub cannot be reached, or has no such revision.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return str(HfApi().repo_info(hub_id, revision=revision, repo_type=kind).sha)
    except Exception as error:  # several libraries raise their own for HTTP, SSL and offline mode
        refused = (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError)
        if otherwise is not None and not isinstance(error, refused):
            return otherwise
        reason = reason_of(error)
        raise DecantError(
            f"{named}={revision} of {hub_id} could not be looked up on the hub ({reason}): check "
            "name and connection, or set it to the 40 digits of a commit, which need no look-up"
        ) from error
