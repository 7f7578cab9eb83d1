"""The one exception that reaches a user as a sentence instead of a traceback.

Whatever a user can cause and cure (a bad parameter, an absent cache, a full disk) is raised as
`DecantError`, whose message is one sentence naming the value, the limit and the remedy. Every
other exception is a defect of ours and keeps its traceback; that is why plain `ValueError`, which
torch and zarr raise too, is not caught by the stages.
"""

import errno

_ACCIDENTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EIO: "the disk reports an input/output error",
    errno.ESTALE: "the network file system lost sight of it",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
    errno.EISDIR: "a folder lies where a file should",
    errno.ENOTDIR: "a file lies where a folder should",
    errno.EEXIST: "a file lies where a folder should",
    errno.ENAMETOOLONG: "the name is too long",
}


def accident(error: OSError) -> str | None:
    """What befell a disk, in words; None where it may as well be a defect of ours."""
    return _ACCIDENTS.get(error.errno or 0)


class DecantError(ValueError):
    """A mistake or an accident outside the program; the message says what to do about it.

    Attributes:
        exit_code: 1 when the work failed or a check did not pass, 2 when the request itself was
            wrong (parameters, flags).
    """

    exit_code = 1


class ParamsError(DecantError):
    """A parameter is missing, unknown or out of range; raised where it enters."""

    exit_code = 2


class MismatchError(DecantError):
    """Two artefacts that must belong together do not (cache and corpus, cache and teacher)."""
