"""The actor pool: all actors take part, users' errors come back as such, nothing but counters returns."""

import sys
import time

import pytest

from nvembed.core.ray_pool import run_pool
from nvembed.types import UserError

pytestmark = pytest.mark.ray


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


@pytest.fixture(autouse=True)
def by_value():
    """Workers of tests are not importable in actors."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[Counter.__module__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[Counter.__module__])


def test_two_actors_share_even_four_short_tasks(ray_session):
    results = list(run_pool(Counter, {}, [{"number": number} for number in range(4)], actors=2))
    assert sorted(result["number"] for result in results) == [0, 1, 2, 3]
    workers = {result["worker"] for result in results}
    assert len(workers) == 2
    for worker in workers:
        assert any(result["worker"] == worker for result in results)
    assert max(result["done"] for result in results) < 4  # no process did it all


def test_users_errors_reach_the_driver(ray_session):
    with pytest.raises(UserError, match="task 1 is bad"):
        list(run_pool(Counter, {"fail_on": 1}, [{"number": number} for number in range(2)], actors=1))
    with pytest.raises(UserError, match="cannot be opened"):
        list(run_pool(Counter, {"broken": True}, [{"number": 0}], actors=1))


def test_no_tasks_start_no_cluster():
    assert list(run_pool(Counter, {}, [], actors=2)) == []
