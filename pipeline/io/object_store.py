"""Folders in an object store, by obstore (the extra `objects`).

obstore takes credentials and endpoints from the environment as the vendors' own tools do
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from pipeline.errors import DecantError, reason_of
from pipeline.io.address import Url
from pipeline.io.retries import FIRST_PAUSE, TRIES, GaveUpError, with_retries
from pipeline.runtime.optional import require

Result = TypeVar("Result")

_CLIENT = {
    "timeout": timedelta(seconds=60),  # per request with its body; a shard has a few megabytes
    "connect_timeout": timedelta(seconds=10),
    "allow_http": True,  # for endpoints given as http; the vendors' own use https
}
_RETRIES = {
    "max_retries": TRIES,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {
        "base": 2,
        "init_backoff": timedelta(seconds=FIRST_PAUSE),
        "max_backoff": timedelta(seconds=15),
    },
}


class ObjectFolder:
    """A prefix in an object store; failed and stalled requests are retried with back-off.

    obstore retries requests that the server refuses (5xx, throttling). Requests that stall, or fail
    while their body is being transferred, are retried here.
    """

    def __init__(self, url: Url) -> None:
        obstore = require("obstore", "objects", str(url))
        from obstore.store import from_url

        self._url = url
        self._obstore = obstore
        try:
            self._store: Any = from_url(url, client_options=_CLIENT, retry_config=_RETRIES)
        except (obstore.exceptions.BaseError, ValueError) as error:
            reason = reason_of(error)
            raise DecantError(
                f"{url} cannot be opened ({reason}): check the address and the credentials in the "
                "environment"
            ) from None

    def read(self, key: str) -> bytes:
        return bytes(self._try("read", key, lambda: self._obstore.get(self._store, key).bytes()))

    def write(self, key: str, data: bytes) -> None:
        self._try("write", key, lambda: self._obstore.put(self._store, key, data))

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._try(
                "write", key, lambda: self._obstore.put(self._store, key, data, mode="create")
            )
        except (FileExistsError, self._obstore.exceptions.AlreadyExistsError):
            return False
        return True

    def sizes(self, prefix: str = "") -> dict[str, int]:
        def collect() -> dict[str, int]:
            pages = self._obstore.list(self._store, prefix=prefix or None)
            return {meta["path"]: meta["size"] for page in pages for meta in page}

        return self._try("list", prefix, collect)

    def remove(self, prefix: str = "") -> None:
        keys = list(self.sizes(prefix)) or ([prefix] if prefix else [])
        try:
            self._try("remove", prefix, lambda: self._obstore.delete(self._store, keys))
        except FileNotFoundError:
            return

    def _try(self, what: str, key: str, request: Callable[[], Result]) -> Result:
        answers = (  # the server's answers, which a retry would not change
            FileNotFoundError,  # raised by obstore for its NotFoundError
            FileExistsError,
            self._obstore.exceptions.AlreadyExistsError,
        )
        refusals = (
            self._obstore.exceptions.PermissionDeniedError,
            self._obstore.exceptions.UnauthenticatedError,
        )

        def may_pass(error: Exception) -> bool | None:
            failed = isinstance(error, (self._obstore.exceptions.BaseError, OSError))
            if isinstance(error, answers) or not failed:
                return None
            return not isinstance(error, refusals)

        try:
            return with_retries(request, may_pass)
        except GaveUpError as error:
            reason = reason_of(error.reason)
            raise DecantError(
                f"cannot {what} {self._url}/{key}, on attempt {error.number} ({reason}): check the "
                "connection, the endpoint and the credentials in the environment"
            ) from error.reason
