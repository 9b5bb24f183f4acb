"""Numbered tasks over files: by Ray Data where a cluster is connected, else in this process, one after the other."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable

import numpy as np

from nvembed.core import storage
from nvembed.types import UserError

logger = logging.getLogger(__name__)


def run_tasks(work: Callable[[int], None], count: int, uri: str, what: str) -> None:
    """Call `work` with 0 .. count - 1.

    Args:
        work: picklable; what it does depends on its number and on files alone, so it may run anywhere, and twice.
        uri: where the files lie; those in this process' memory are nobody else's.
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
    import ray.data

    numbers = ray.data.range(count, override_num_blocks=count)
    done = numbers.map_batches(functools.partial(_work_on, work=work), batch_size=None, num_cpus=1).take_all()
    if problems := sorted(row["error"] for row in done if row["error"]):
        raise UserError(problems[0])
    assert sorted(row["id"] for row in done) == list(range(count)), "Ray Data lost a task"


def _work_on(batch: dict[str, np.ndarray], work: Callable[[int], None]) -> dict[str, np.ndarray]:
    """A user's error travels back as data: Ray would wrap it."""
    errors = []
    for number in batch["id"].tolist():
        try:
            work(number)
            errors.append("")
        except UserError as error:
            errors.append(str(error))
    return {**batch, "error": np.array(errors, object)}
