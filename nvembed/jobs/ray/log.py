"""Following the log of a Ray job across lost connections, without gaps or repetitions."""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Any

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential_jitter

from nvembed.jobs.backend import Say

QUIET_SECONDS = 60.0  # without output for so long, check on a new connection whether the job still runs
PENDING_SECONDS = 10.0
PAUSE_SECONDS = 1.0


class _Tail:
    """The log so far; a new connection starts again at its beginning."""

    def __init__(self, client: Any, job_id: str, write: Say, say: Say) -> None:
        self._client, self._job_id, self._write, self._say = client, job_id, write, say
        self._shown = 0  # characters
        self._waiting = ""
        self.heard = time.monotonic()  # when the cluster last answered

    def once(self) -> Any:
        """Read until the job ends, the connection is lost (raises), or it is quiet; the job's details."""
        asyncio.run(self._read())
        details = self._client.get_job_info(self._job_id)
        self.heard = time.monotonic()
        if str(details.status.value) == "PENDING":
            reason = (details.message or "").partition("\n")[0]
            if reason != self._waiting:
                self._waiting = reason
                self._say(f"{self._job_id}: pending. {reason}")
        return details

    async def _read(self) -> None:
        skip = self._shown
        lines = self._client.tail_job_logs(self._job_id)
        try:
            while True:
                patience = QUIET_SECONDS if self._shown else PENDING_SECONDS
                try:
                    text = await asyncio.wait_for(anext(lines), patience)
                except (StopAsyncIteration, TimeoutError):
                    return
                self.heard = time.monotonic()
                fresh, skip = text[skip:], max(0, skip - len(text))
                self._shown += len(fresh)
                if fresh:
                    self._write(fresh)
        finally:
            await lines.aclose()


def follow_log(client: Any, job_id: str, write: Say, say: Say, patience: float) -> Any:
    """Write the job's log until it ends.

    Args:
        client: Ray's JobSubmissionClient.
        job_id: the submission id.
        write: takes pieces of the log, line ends included.
        say: takes lines about waiting and lost connections.
        patience: seconds without any answer of the cluster before this gives up.

    Returns:
        The job's details (terminal).

    Raises:
        ConnectionError: the cluster did not answer for `patience` seconds.
        ray.exceptions.AuthenticationError: it no longer takes our token.
        RuntimeError: there is no such job.
    """
    tail = _Tail(client, job_id, write, say)

    def lost(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        say(f"{job_id}: connection lost ({reason}); the job continues, trying again")

    while True:
        retrying = Retrying(
            retry=retry_if_exception(is_lost),
            wait=wait_exponential_jitter(initial=1, max=20),
            stop=lambda _: time.monotonic() - tail.heard > patience,
            before_sleep=lost,
            reraise=True,
        )
        try:
            details = retrying(tail.once)
        except Exception as error:
            if not is_lost(error):
                raise
            raise ConnectionError(str(error) or type(error).__name__) from error
        if details.status.is_terminal():
            return details
        time.sleep(PAUSE_SECONDS)


def is_lost(error: BaseException) -> bool:
    """Whether another attempt may succeed: after errors of the network, not of the token or a missing job."""
    import aiohttp
    import requests
    from ray.exceptions import RayError

    if isinstance(error, RayError | ssl.SSLCertVerificationError):  # aiohttp's own error is one of these too
        return False
    if isinstance(error, RuntimeError):  # Ray's: a socket that closed, or an answer with an error code
        return "status code 4" not in str(error)
    return isinstance(error, OSError | aiohttp.ClientError | requests.exceptions.RequestException | TimeoutError)
