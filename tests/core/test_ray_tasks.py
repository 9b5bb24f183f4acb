"""Tasks under Ray: all actors take part, nothing but counters returns, users' errors come back as they were raised."""

import errno
import functools
import sys
import time
from pathlib import Path

import pytest

from nvembed.core.ray_tasks import run_pool, run_tasks
from nvembed.pipeline.exit_codes import report_error
from nvembed.types import UserError


class Counter:
    """A worker that counts what its process did."""

    def __init__(self, fail_on: int | None = None, broken: bool = False) -> None:
        if broken:
            raise UserError("the model cannot be opened")
        self._fail_on, self._done = fail_on, 0

    def work(self, task):
        if task["number"] == self._fail_on:
            raise UserError(f"task {task['number']} is bad")
        time.sleep(0.05)
        self._done += 1
        return {"number": task["number"], "done": self._done}


@pytest.fixture
def by_value():
    """Workers of tests are not importable in actors."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[Counter.__module__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[Counter.__module__])


@pytest.mark.ray
def test_two_actors_share_even_four_short_tasks(ray_session, by_value):
    results = list(run_pool(Counter, {}, [{"number": number} for number in range(4)], actors=2))
    assert sorted(result["number"] for result in results) == [0, 1, 2, 3]
    workers = {result["worker"] for result in results}
    assert len(workers) == 2
    for worker in workers:
        assert any(result["worker"] == worker for result in results)
    assert max(result["done"] for result in results) < 4  # no process did it all


@pytest.mark.ray
def test_users_errors_reach_the_driver(ray_session, by_value):
    with pytest.raises(UserError, match="task 1 is bad"):
        list(run_pool(Counter, {"fail_on": 1}, [{"number": number} for number in range(2)], actors=1))
    with pytest.raises(UserError, match="cannot be opened"):
        list(run_pool(Counter, {"broken": True}, [{"number": 0}], actors=1))


def test_no_tasks_start_no_cluster():
    assert list(run_pool(Counter, {}, [], actors=2)) == []


def write(folder: str, number: int) -> None:
    Path(folder, str(number)).write_text("done")


def refuse(folder: str, number: int) -> None:
    if number == 1:
        raise UserError(f"task {number} has bad input")


def fill(folder: str, number: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", f"{folder}/file")


@pytest.mark.ray
def test_errors_of_tasks(ray_session: None, tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_tasks(functools.partial(write, folder), 3, folder, "files")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]
    with pytest.raises(UserError, match=r"^task 1 has bad input$"):
        run_tasks(functools.partial(refuse, folder), 3, folder, "files")
    messages: list[str] = []
    with pytest.raises(Exception) as raised:
        run_tasks(functools.partial(fill, folder), 2, folder, "files")
    assert report_error(raised.value, messages.append, folder) == 4
    assert messages[0] == f"error: OSError: [Errno 28] No space left on device: '{folder}/file'"
