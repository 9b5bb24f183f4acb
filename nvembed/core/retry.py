"""Retries of transient storage errors: which errors count as transient, how often and how long to retry.

s3fs and its kin retry the errors they know to be transient; this is one layer above, for those they pass on: answers of
5xx, throttling, broken connections, truncated bodies. A permanent error (missing, forbidden, disk full) is never
retried; a full disk is named.
"""

from __future__ import annotations

import errno
import functools
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

ATTEMPTS = 6
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0  # seconds; doubled each time, with jitter: about half a minute in all

_PASSING = {
    errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED,
    errno.EPIPE, errno.EHOSTUNREACH, errno.ENETUNREACH, getattr(errno, "EREMOTEIO", errno.EIO),
}  # fmt: skip
_PASSING_NAMES = {  # of the HTTP clients below fsspec, which are not OSErrors
    "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError", "HTTPClientError",
    "ClientConnectorError", "ServerDisconnectedError", "ServerTimeoutError",
    # an answer whose body ends early
    "ClientPayloadError", "ResponseStreamingError", "ResponseParserError", "IncompleteReadError", "IncompleteRead",
    "ChunkedEncodingError",
}  # fmt: skip


def passing(error: BaseException) -> bool:
    """Whether an error is transient: 5xx (an errno of s3fs), throttling, broken connections, truncated bodies."""
    if isinstance(
        error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError | FileExistsError
    ):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if any(kind.__name__ in _PASSING_NAMES for kind in type(error).__mro__):
        return True
    code = getattr(error, "code", None)  # gcsfs
    if isinstance(code, int) and (code == 429 or 500 <= code < 600):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING


def retried(function: Callable[P, R]) -> Callable[P, R]:
    """Call again, with growing waits, while storage has transient errors; the last error is raised as it came.

    Only for functions that may run twice: each leaves the same thing behind however often it is called.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not passing(error):
                raise
            return _again(function, error, *args, **kwargs)

    return call


def _again(function: Callable[P, R], first: Exception, *args: P.args, **kwargs: P.kwargs) -> R:
    from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

    def say(state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        logger.warning("storage: %s (%s); trying again (%d)", function.__name__, _short(error), state.attempt_number)

    logger.warning("storage: %s (%s); trying again", function.__name__, _short(first))
    waits = wait_exponential_jitter(initial=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT)
    retrying = Retrying(
        retry=retry_if_exception(passing), stop=stop_after_attempt(ATTEMPTS - 1), wait=waits, before_sleep=say,
        reraise=True,
    )  # fmt: skip
    retrying.sleep(FIRST_WAIT)
    return retrying(function, *args, **kwargs)


class RetriedFile(io.RawIOBase):
    """A file whose reads are repeated at the same offset after a transient error; wrap it in an `io.BufferedReader`.

    Args:
        file: open for reading, seekable; closed with this one.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._place = 0

    def readable(self) -> bool:
        """True: the file was opened for reading."""
        return True

    def seekable(self) -> bool:
        """True: the file below is seekable."""
        return True

    def tell(self) -> int:
        """Offset of the next byte to read."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place; nothing is read."""
        if whence == io.SEEK_END:
            self._place = self._file.seek(offset, whence)
        else:
            self._place = offset + (self._place if whence == io.SEEK_CUR else 0)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Read at most as much as fits; 0 at the end."""
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    @retried
    def _read(self, count: int) -> bytes:
        self._file.seek(self._place)
        return self._file.read(count)

    def close(self) -> None:
        """Close both."""
        self._file.close()
        super().close()


def _short(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"[:200]


@contextmanager
def placed(uri: str) -> Iterator[None]:
    """Inside the block, the error of a full disk names the file; the operating system's does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror}; make room and run again", uri) from error
