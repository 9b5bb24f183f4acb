"""A cluster that stops answering for good while a job is followed."""

import socket
from collections.abc import AsyncIterator

import aiohttp
import pytest

from nvembed.jobs.ray.log import follow_log


class Gone:
    """A client whose cluster has gone: real connections to a port where nobody listens."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{self.url}/api/jobs/{job_id}/logs/tail"):
            yield ""


def test_giving_up_is_a_lost_connection() -> None:
    """As the caller tells users of a ConnectionError: "cannot be reached", exit 3, and not "the job failed"."""
    said: list[str] = []
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1"):
        follow_log(Gone(), "job", lambda text: None, said.append, 0.5)
    assert "the job goes on, trying again" in said[0]
