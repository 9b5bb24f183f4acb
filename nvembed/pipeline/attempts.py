"""`<out>/steps.json`: the records of every run of an output; a resumed run's report counts the earlier ones.

attempts   one entry per run: pipeline, started, seconds, status (done | failed | interrupted | killed), peak_pss_mb,
           and per pipeline step it reached: status, seconds, peak_pss_mb, artifact
"""

from __future__ import annotations

import time
from typing import Any

from nvembed.core import storage
from nvembed.core.steps import RECORDS
from nvembed.report.attempts import read_attempts, whole_step


class Records:
    """Records of one output; the current run is the last attempt.

    Args:
        out: output root.
        fence: fencing number of this run's lease.
        pipeline: name of the pipeline that runs.
    """

    def __init__(self, out: str, fence: int, pipeline: str) -> None:
        self._file = storage.join(out, RECORDS)
        self._attempts = read_attempts(out)
        for attempt in self._attempts:
            if attempt["status"] == "running":
                attempt["status"] = "killed"
        self._started = time.monotonic()
        self._attempts.append(
            {
                "pipeline": pipeline,
                "started": time.time(),
                "fence": fence,
                "status": "running",
                "seconds": 0.0,
                "peak_pss_mb": 0.0,
                "steps": {},
            }
        )

    @property
    def _current(self) -> dict[str, Any]:
        return self._attempts[-1]

    def write(self, peak_mb: float) -> None:
        """Bring the file up to date."""
        self._current["seconds"] = time.monotonic() - self._started
        self._current["peak_pss_mb"] = max(self._current["peak_pss_mb"], peak_mb)
        storage.write_json(self._file, {"attempts": self._attempts})

    def step(self, name: str, status: str, seconds: float, peak_mb: float | None, artifact: str | None) -> None:
        """Set the state of a step; call `write` to save it."""
        entry = {"status": status, "seconds": seconds, "peak_pss_mb": peak_mb, "artifact": artifact}
        self._current["steps"][name] = entry

    def close(self, status: str, peak_mb: float) -> None:
        """Set how the run ended (done, failed or interrupted), and save it."""
        self._current["status"] = status
        self.write(peak_mb)

    def steps(self) -> list[dict[str, Any]]:
        """This run's steps in order: name, status, seconds, peak_pss_mb, artifact, attempts.

        `seconds` is the time spent on the step, summed over all attempts; `peak_pss_mb` the highest of those attempts.
        A skipped step keeps the numbers of the attempts that built it.
        """
        return [whole_step(self._attempts, name, entry) for name, entry in self._current["steps"].items()]

    @property
    def wall_seconds(self) -> float:
        """Seconds of this run so far and of all earlier runs of the output."""
        earlier = sum(attempt["seconds"] for attempt in self._attempts[:-1])
        return float(earlier + time.monotonic() - self._started)

    @property
    def peak_mb(self) -> float:
        """Highest memory of this run (as last written) and of all earlier ones."""
        return float(max(attempt["peak_pss_mb"] for attempt in self._attempts))

    @property
    def attempts(self) -> int:
        """Runs of this output, this one included."""
        return len(self._attempts)
