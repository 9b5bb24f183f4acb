"""Ray Data actor pools over files: a task names its input and output files, only counters come back.

Rows never pass through the driver or the object store: each actor reads a shard, works, and writes the result
atomically. That keeps memory at one shard per actor, and makes a killed run restartable file by file.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa

from nvembed.core.ray_cluster import ensure_ray
from nvembed.types import UserError

logger = logging.getLogger(__name__)

_ACTOR_START_SECONDS = 600
_LOG_SECONDS = 5.0


class Worker(Protocol):
    """What runs inside an actor: built once per process, called once per task."""

    def work(self, task: dict[str, Any]) -> dict[str, Any]:
        """Do one task (JSON-like) and return counters (JSON-like)."""
        ...


class PoolActor:
    """The Ray Data callable class around a `Worker`; a user's error travels back as data, not as a dead actor."""

    def __init__(self, factory: Callable[..., Worker], arguments: dict[str, Any]) -> None:
        self._error: str | None = None
        try:
            self._worker = factory(**arguments)
        except UserError as error:
            self._error = str(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        results = [json.dumps(self._one(json.loads(task))) for task in batch.column("task").to_pylist()]
        return pa.table({"result": pa.array(results, pa.string())})

    def _one(self, task: dict[str, Any]) -> dict[str, Any]:
        if self._error is not None:
            return {"error": self._error}
        started = time.process_time()
        try:
            result = self._worker.work(task)
        except UserError as error:
            return {"error": str(error)}
        cpu = time.process_time() - started
        return {**result, "worker": f"{os.getpid()}@{socket.gethostname()}", "cpu_seconds": cpu}


def run_pool(
    factory: Callable[..., Worker],
    arguments: dict[str, Any],
    tasks: Sequence[dict[str, Any]],
    *,
    actors: int,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Run tasks in a Ray Data actor pool; yields each task's counters, in no fixed order.

    Every task is a block of its own (Ray Data reads several small files as one block, which keeps all but one actor
    idle), no actor is given a second task while it works, and work starts when all actors stand: so all take part.

    Raises:
        UserError: a worker raised one.
    """
    if not tasks:
        return
    ensure_ray()
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    items = [{"task": json.dumps(task)} for task in tasks]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        PoolActor,
        fn_constructor_args=(factory, arguments),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=cpus,
        num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(items)), max_tasks_in_flight_per_actor=1),
    )
    dataset.context.wait_for_min_actors_s = _ACTOR_START_SECONDS
    dataset.context.enable_progress_bars = False
    for row in dataset.iter_rows():
        result = json.loads(row["result"])
        if "error" in result:
            raise UserError(result["error"])
        yield result


class ProgressLog:
    """One log line every few seconds: done, rate, time left. The clock starts with the first result, so the rate does
    not count the seconds in which actors load their model."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._started = self._last = 0.0
        self._done = self._before = 0

    def add(self, count: int) -> None:
        """Count finished work."""
        now = time.monotonic()
        if self._done == 0:
            self._started = self._last = now
            self._before = count
        self._done += count
        if now - self._last < _LOG_SECONDS and self._done < self._total:
            return
        self._last = now
        rate = (self._done - self._before) / max(now - self._started, 1e-9)
        left = f"{(self._total - self._done) / rate:.0f} s left" if rate else "time left not known yet"
        said = (self._what, self._done, self._total, self._unit, rate, left)
        logger.info("%s: %d of %d %s, %.0f/s, %s", *said, extra={"transient": True})
