"""The one exception that reaches a user as a sentence instead of a traceback.

Everything that a user can cause and fix (a bad parameter, a missing cache, a full disk) is raised
as `DecantError`. Its message is one sentence that names the value, the limit and the remedy. Every
other exception is a bug in Decant and keeps its traceback. That is why the stages do not catch
plain `ValueError`, which torch and zarr raise too.
"""

from __future__ import annotations

import errno
import re
import reprlib

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ACCIDENTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EIO: "the disk reports an input/output error",
    errno.ESTALE: "the network file system lost track of the file",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open",
    errno.EISDIR: "a folder lies where a file should",
    errno.ENOTDIR: "a file lies where a folder should",
    errno.EEXIST: "a file lies where a folder should",
    errno.ENAMETOOLONG: "the name is too long",
}


_OF_RUST = re.compile(r"\(os error (\d+)\)")
"""The form in which safetensors and tokenizers, written in Rust, report a system error."""

_GPU_IS_FULL = re.compile(
    r"CUDA out of memory|CUDA error: (out of memory|\w*ALLOC_FAILED)|\[CUDA\]: out of memory"
)
"""What PyTorch, cuBLAS and Triton say of a GPU without room."""

_OF_CUDA = re.compile(r"[Tt]ried to allocate .*?(?= Including non-PyTorch| Of the allocated|$)")
"""The part of PyTorch's message that says how much of a GPU was wanted, and how much is free."""

_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written|unexpected pos \d+ vs \d+")
"""The form in which NumPy's tofile and torch.save report a write that was cut short."""

_UNPRINTABLE = re.compile(
    r"\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters other than tab and newline, bidirectional overrides, and surrogates."""

_LONGEST = 150  # characters of a value in a message
_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 70
_shortened.maxlist = _shortened.maxtuple = 8
_shortened.maxlevel = 3


def accident(error: BaseException) -> str | None:
    """Describe a disk error for the user; None if the error may be a bug in Decant."""
    return _ACCIDENTS.get(_number(error))


def memory_shortage(error: BaseException) -> str | None:
    """Describe an allocation that failed on a GPU or in the machine's memory; None if none did."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError" or _GPU_IS_FULL.search(text):
        details = _OF_CUDA.search(text)
        return f"the GPU's memory is full ({details[0]})" if details else "the GPU's memory is full"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "the machine's memory is full"
    return None


def is_full(error: BaseException) -> bool:
    """Return whether an error means that a disk, a quota or a file has no more room."""
    return _number(error) in _FULL


def place_of(error: BaseException) -> str:
    """Return the path that a disk error is about; for a copy, the file that was being written."""
    names = (getattr(error, "filename2", None), getattr(error, "filename", None))
    return next((str(name) for name in names if name is not None), "")


def _number(error: BaseException) -> int:
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if _SHORT_WRITE.search(str(error)):
        return errno.ENOSPC
    found = _OF_RUST.search(str(error))
    return int(found[1]) if found else 0


def reason_of(error: BaseException, longest: int = 200) -> str:
    """Return another library's message on one line, shortened; its type if it has no message."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


def is_library_error(error: BaseException) -> bool:
    """Return whether a library raised an error, as opposed to an interrupt or an exit.

    A panic in a library written in Rust (pyo3's PanicException) is not an Exception.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def printable(text: str) -> str:
    r"""Make foreign text safe to print: escape what a terminal would obey, for example \x1b[2J.

    Generated text, documents, file names and quotations of them in error messages pass through this
    function before they are printed. Newlines, tabs and all printable Unicode are kept.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(value: object) -> str:
    """Return a value's repr for a message, limited in length and depth."""
    text = _shortened.repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class DecantError(ValueError):
    """An error with a cause outside the program; the message says what to do about it.

    Attributes:
        exit_code: 1 if the work failed or a check did not pass, 2 if the request itself was wrong
            (parameters, flags).
    """

    exit_code = 1


class ParamsError(DecantError):
    """A parameter is missing, unknown or out of range; raised as soon as it is read."""

    exit_code = 2


class OtherRankError(DecantError):
    """Another rank failed and reports why; this rank exits with the same status, silently."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another rank failed")
        self.exit_code = exit_code


class MismatchError(DecantError):
    """Two artefacts that must belong together do not, for example cache and corpus or teacher."""
