"""Tasks over files, run by Ray Data: a task names its files, only counters and errors come back.

Rows never pass through the driver or the object store: a worker reads a shard, works, and writes the result whole.
That keeps memory at one shard per worker, and makes a killed run restartable file by file.

`run_pool`: tasks for actors, each of which holds something costly (a model, an index).
`run_tasks`: numbered tasks that hold nothing; in this process where Ray is not connected.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from nvembed.core import storage
from nvembed.core.ray_cluster import ensure_ray
from nvembed.types import UserError

if TYPE_CHECKING:
    from ray.data import Dataset

logger = logging.getLogger(__name__)

_ACTOR_START_SECONDS = 600
_LOG_SECONDS = 5.0

Task = dict[str, Any]  # JSON-like, as is what comes back


class Worker(Protocol):
    """The work of one actor: built once per process, called once per task."""

    def work(self, task: Task) -> Task:
        """Do one task and return counters."""
        ...


def run_pool(
    factory: Callable[..., Worker],
    arguments: dict[str, Any],
    tasks: Sequence[Task],
    *,
    actors: int,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> Iterator[Task]:
    """Run tasks in a Ray Data actor pool; yields each task's counters, in no fixed order.

    No actor is given a second task while it works, and work starts when all actors stand: so all take part.

    Raises:
        UserError: a worker raised one.
    """
    if not tasks:
        return
    ensure_ray()
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    dataset = _one_block_each(tasks).map_batches(
        PoolActor,
        fn_constructor_args=(factory, arguments),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=cpus,
        num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(tasks)), max_tasks_in_flight_per_actor=1),
    )
    dataset.context.wait_for_min_actors_s = _ACTOR_START_SECONDS
    dataset.context.enable_progress_bars = False
    for result in _results(dataset):
        if "error" in result:
            raise UserError(result["error"])
        yield result


def run_tasks(work: Callable[[int], None], count: int, uri: str, what: str) -> None:
    """Call `work` with 0 .. count - 1: by Ray Data where a cluster is connected, else here, one after the other.

    Args:
        work: picklable; what it does depends on its number and on files alone, so it may run anywhere, and twice.
        uri: where the files lie; files in this process' memory cannot be reached from another.
        what: named in the log, in the plural.

    Raises:
        UserError: a task raised one.
    """
    ray = sys.modules.get("ray")  # not imported means not connected
    here = storage.filesystem(uri)[0].protocol == "memory"
    if count <= 1 or here or ray is None or not ray.is_initialized():
        for number in range(count):
            work(number)
        return
    logger.info("%d %s with Ray Data", count, what)
    dataset = _one_block_each([{"number": number} for number in range(count)]).map_batches(
        functools.partial(_work_on, work=work), batch_size=1, batch_format="pyarrow", num_cpus=1
    )
    results = list(_results(dataset))
    if problems := sorted(row["error"] for row in results if "error" in row):
        raise UserError(problems[0])
    assert sorted(row["number"] for row in results) == list(range(count)), "Ray Data lost a task"


# -- what both share --------------------------------------------------------------------------------------------------


def _one_block_each(tasks: Sequence[Task]) -> Dataset:
    """A block for each task: Ray Data reads several small files as one block, which keeps all but one worker idle."""
    import ray.data

    return ray.data.from_items([{"task": json.dumps(task)} for task in tasks], override_num_blocks=len(tasks))


def _answered(batch: pa.Table, work: Callable[[Task], Task]) -> pa.Table:
    """The results of a batch of tasks; a user's error travels back as data, as Ray would wrap it."""
    results = []
    for task in batch.column("task").to_pylist():
        try:
            result = work(json.loads(task))
        except UserError as error:
            result = {"error": str(error)}
        results.append(json.dumps(result))
    return pa.table({"result": pa.array(results, pa.string())})


def _results(dataset: Dataset) -> Iterator[Task]:
    return (json.loads(row["result"]) for row in dataset.iter_rows())


def _work_on(batch: pa.Table, work: Callable[[int], None]) -> pa.Table:
    def one(task: Task) -> Task:
        work(task["number"])
        return task

    return _answered(batch, one)


class PoolActor:
    """The Ray Data callable class around a `Worker`; an error of its start is the result of each of its tasks."""

    def __init__(self, factory: Callable[..., Worker], arguments: dict[str, Any]) -> None:
        self._error: UserError | None = None
        try:
            self._worker = factory(**arguments)
        except UserError as error:
            self._error = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _answered(batch, self._one)

    def _one(self, task: Task) -> Task:
        if self._error is not None:
            raise self._error
        started = time.process_time()
        result = self._worker.work(task)
        cpu = time.process_time() - started
        return {**result, "worker": f"{os.getpid()}@{socket.gethostname()}", "cpu_seconds": cpu}


# -- progress ---------------------------------------------------------------------------------------------------------


class ProgressLog:
    """One log line every few seconds: done, rate, time left.

    The clock starts with the first result, so the rate does not count the seconds in which actors load their model.
    """

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
        values = (self._what, self._done, self._total, self._unit, rate, left)
        logger.info("%s: %d of %d %s, %.0f/s, %s", *values, extra={"transient": True})
