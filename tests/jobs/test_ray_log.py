"""A cluster that stops answering for good while a job is followed."""

import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest

from nvembed.jobs.ray.log import follow_log, is_lost


class Gone:
    """A client whose cluster has gone: real connections to a port without a listener."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{self.url}/api/jobs/{job_id}/logs/tail"):
            yield ""


def test_giving_up_is_a_lost_connection() -> None:
    """The caller reports a ConnectionError as "cannot be reached" with exit code 3, not as a failed job."""
    assert is_lost(ConnectionError()), "its modules are loaded here, not within the half second below"
    lines: list[str] = []
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        follow_log(Gone(), "job", lambda text: None, lines.append, 0.5)
    assert "the job continues, trying again" in lines[0]
