"""What is tried again, how often, and what never is."""

import errno
import http.client
import io

import pytest

from nvembed.core import retry
from nvembed.core.retry import passing, retried


class HttpError(Exception):
    """As gcsfs raises it."""

    def __init__(self, code: int) -> None:
        super().__init__(str(code))
        self.code = code


class EndpointConnectionError(Exception):
    """As botocore raises it."""


class ClientPayloadError(Exception):
    """As aiohttp raises it, or a subclass, where a body ends early."""


class Cut(ClientPayloadError):
    pass


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (OSError(errno.EBUSY, "SlowDown"), True),
        (OSError(errno.EIO, "5xx"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (HttpError(503), True),
        (HttpError(429), True),
        (EndpointConnectionError(), True),
        (Cut(), True),
        (http.client.IncompleteRead(b"half", 4), True),
        (HttpError(404), False),
        (FileNotFoundError(errno.ENOENT, "no"), False),
        (PermissionError(errno.EACCES, "no"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError("no number"), False),
        (ValueError("no"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception, again: bool) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.0)
    calls = []

    @retried
    def fails(times: int) -> int:
        calls.append(times)
        if len(calls) <= times:
            raise error
        return len(calls)

    assert passing(error) == again
    with pytest.raises(type(error)):
        fails(99)
    assert len(calls) == (retry.ATTEMPTS if again else 1)
    calls.clear()
    if again:
        assert fails(retry.ATTEMPTS - 1) == retry.ATTEMPTS
    assert fails(0) > 0


def test_a_retried_read_continues_at_its_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other read of the file below fails after having moved."""
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)
    data = bytes(range(256)) * 40

    class Flaky(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            result = super().read(size)
            self.reads += 1
            if self.reads % 2:
                raise OSError(errno.EBUSY, "SlowDown")
            return result

    with io.BufferedReader(retry.RetriedFile(Flaky(data)), 512) as file:
        assert file.read() == data
        assert file.seek(-10, io.SEEK_END) == len(data) - 10 and file.read(20) == data[-10:]
        file.seek(1000)
        assert file.seek(24, io.SEEK_CUR) == 1024 and file.read(3) == data[1024:1027] and file.tell() == 1027
