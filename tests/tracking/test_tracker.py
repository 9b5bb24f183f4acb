"""Tracking against a real MLflow store on SQLite: exactly once, one run per output, outages survived."""

import json
import logging
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from artifacts import publish
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from nvembed.core import storage
from nvembed.core.steps import StepResult, load_artifact
from nvembed.tracking.config import TrackingConfig
from nvembed.tracking.store import Follower, flatten, numbers, resolve_store
from nvembed.tracking.tracker import Tracker, open_client
from nvembed.types import Artifact, Config, UserError

RECIPE = {"name": "tiny", "prepare": {"seed": 17, "sources": [{"type": "cwe"}, {"type": "beir"}]}}


class StepConfig(Config):
    """A step's config with nested values."""

    steps: int = 3
    weights: dict[str, float] = Field(default={"cwe": 1.0})
    dims: tuple[int, ...] = (32, 64)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database, made once (the migrations take seconds)."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    open_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def out(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return str(tmp_path)


def tracker(out: str, **config: Any) -> Tracker:
    return Tracker(TrackingConfig(**config), out, RECIPE, "tiny")


def rows(first: int, last: int) -> bytes:
    lines = [
        {"step": step, "loss": 1.0 / (step + 1), "lr": 1e-3, "grad_norm": 2.0, "sample_ids_sha256": "ab"}
        for step in range(first, last)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def source_artifact(out: str) -> Artifact:
    result = StepResult(rows={"train": 7})
    return publish(storage.join(out, "prepare"), "prepare", lambda uri: result, StepConfig(steps=1))


def train(out: str, source: Artifact, data: bytes) -> Artifact:
    def build(uri: str) -> StepResult:
        storage.write_bytes(storage.join(uri, "metrics.jsonl"), data)
        return StepResult(rows={"examples": 3}, metrics={"a set": {"loss@64": 0.5, "text": "a private text"}})

    return publish(storage.join(out, "train"), "train", build, StepConfig(), prepare=source)


def run_steps(out: str, source: Artifact, data: bytes) -> Tracker:
    """The calls of a pipeline with two steps."""
    tracking = tracker(out)
    with tracking.step("prepare", StepConfig(steps=1)) as handle:
        handle.finish(source, "skipped")
    with tracking.step("train", StepConfig(), {"prepare": source}) as handle:
        storage.write_bytes(storage.join(out, "live.jsonl"), data[: len(data) // 2])
        handle.tail(storage.join(out, "live.jsonl"))
        handle.finish(train(out, source, data))
    tracking.close()
    return tracking


def all_runs(out: str, experiment: str = "nvembed") -> dict[str, list[Any]]:
    client = open_client(f"sqlite:///{out}/mlflow.db")
    entity = client.get_experiment_by_name(experiment)
    runs: dict[str, list[Any]] = {}
    for run in client.search_runs([entity.experiment_id]) if entity else []:
        runs.setdefault(run.info.run_name, []).append(run)
    return runs


def history(out: str, run_id: str, key: str) -> list[tuple[int, float]]:
    metrics = open_client(f"sqlite:///{out}/mlflow.db").get_metric_history(run_id, key)
    return sorted((metric.step, metric.value) for metric in metrics)


def check_complete(out: str, source: Artifact, steps: int) -> None:
    """One run each, everything in it once."""
    runs = all_runs(out)
    assert {name: len(runs_of_name) for name, runs_of_name in runs.items()} == {"tiny": 1, "prepare": 1, "train": 1}
    (parent,), (child,) = runs["tiny"], runs["train"]
    assert parent.data.params["prepare.sources.1.type"] == "beir"
    assert [run[0].info.status for run in runs.values()] == ["FINISHED"] * 3
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params == {"steps": "3", "weights.cwe": "1.0", "dims": "[32, 64]"}
    manifest = storage.read_json(storage.join(out, "train", "manifest.json"))
    assert child.data.tags["nvembed.fingerprint"] == manifest["fingerprint"]
    assert child.data.tags["nvembed.manifest_hash"] == manifest["content_hash"]
    assert child.data.tags["nvembed.input.prepare"] == source.manifest_hash
    (dataset,) = child.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("prepare", source.manifest_hash[:36])
    assert child.data.metrics["result/a set/loss_64"] == 0.5
    assert "private" not in str(child.data.params) + str(child.data.tags) + str(child.data.metrics)
    for key, value in (("loss", lambda step: 1.0 / (step + 1)), ("lr", lambda step: 1e-3)):
        assert history(out, child.info.run_id, key) == [(step, value(step)) for step in range(steps)]


# -- what MLflow receives ----------------------------------------------------------------------------------------------


def test_runs_parameters_lineage_and_metrics(out: str) -> None:
    source = source_artifact(out)
    run_steps(out, source, rows(0, 5))
    check_complete(out, source, 5)
    assert not Path(out, "mlruns").exists()


def test_a_second_run_adds_nothing_and_makes_no_call(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_artifact(out)
    first = run_steps(out, source, rows(0, 5))
    monkeypatch.setattr("nvembed.tracking.tracker.open_client", lambda uri: pytest.fail("MLflow was called"))
    second = skip_steps(out, source)
    assert second.parent_run_id == first.parent_run_id
    check_complete(out, source, 5)


def skip_steps(out: str, source: Artifact) -> Tracker:
    tracking = tracker(out)
    with tracking.step("prepare", StepConfig(steps=1)) as handle:
        handle.finish(source, "skipped")
    with tracking.step("train", StepConfig(), {"prepare": source}) as handle:
        handle.finish(load_artifact(storage.join(out, "train")), "skipped")
    assert tracking.close()
    return tracking


def test_more_rows_than_one_batch_holds(out: str) -> None:
    source = source_artifact(out)
    run_steps(out, source, rows(0, 1500))
    check_complete(out, source, 1500)


def test_changed_inputs_get_a_new_run(out: str) -> None:
    tracking = tracker(out)
    for steps in (3, 4):
        with tracking.step("train", StepConfig(steps=steps)) as handle:
            assert handle.run_id is not None
    assert sorted(run.data.params["steps"] for run in all_runs(out)["train"]) == ["3", "4"]


def test_failure_and_interruption_are_statuses(out: str) -> None:
    tracking = tracker(out)
    for name, error in (("bad", RuntimeError), ("stopped", KeyboardInterrupt)):
        with suppress(error), tracking.step(name):
            raise error
    tracking.close("interrupted")
    statuses = {name: runs[0].info.status for name, runs in all_runs(out).items()}
    assert statuses == {"bad": "FAILED", "stopped": "KILLED", "tiny": "KILLED"}


def test_runs_deleted_in_mlflow_are_made_again(out: str) -> None:
    source = source_artifact(out)
    first = run_steps(out, source, rows(0, 5))
    client = open_client(f"sqlite:///{out}/mlflow.db")
    for runs_of_name in all_runs(out).values():
        client.delete_run(runs_of_name[0].info.run_id)
    tracking = tracker(out)
    with tracking.step("more") as handle:
        assert handle.run_id is not None
    tracking.close()
    assert tracking.parent_run_id != first.parent_run_id
    runs = all_runs(out)
    assert {name: len(runs_of_name) for name, runs_of_name in runs.items()} == {
        "tiny": 1,
        "prepare": 1,
        "train": 1,
        "more": 1,
    }
    assert len(history(out, runs["train"][0].info.run_id, "loss")) == 5


def test_disabled_does_nothing(out: str) -> None:
    tracking = tracker(out, enabled=False)
    with tracking.step("train", StepConfig()) as handle:
        assert handle.tail() and handle.run_id is None
    assert tracking.close()
    assert not Path(out, "tracking.json").exists()


# -- crashes --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Simulates kill -9: nothing catches it."""


class Dying:
    """The real client, until a given call, before or after which the process "dies"."""

    calls = 0

    def __init__(self, client: Any, at: int, after: bool) -> None:
        self._client, self._at, self._after = client, at, after

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            number = Dying.calls
            Dying.calls += 1
            if number > self._at or (number == self._at and not self._after):
                raise Killed
            result = real(*args, **kwargs)
            if number == self._at:
                raise Killed
            return result

        return call


@pytest.mark.parametrize(
    ("after", "stride"), [(False, 5), pytest.param(True, 2, marks=pytest.mark.slow)], ids=["before", "after"]
)
def test_killed_at_any_call_then_resumed(out: str, monkeypatch: pytest.MonkeyPatch, after: bool, stride: int) -> None:
    """A new process goes on where a killed one was, at any call to MLflow: one run, each row once.

    A stride keeps it short; with 1 every call is tried.
    """
    for at in range(0, 100, stride):
        here = str(Path(out, str(at)))
        Path(here).mkdir()
        shutil.copy(Path(out, "mlflow.db"), here)
        source = source_artifact(here)
        Dying.calls = 0
        with monkeypatch.context() as patched:
            patched.setattr(
                "nvembed.tracking.tracker.open_client", lambda uri, at=at: Dying(open_client(uri), at, after)
            )
            try:
                run_steps(here, source, rows(0, 5))
            except Killed:
                pass
            else:
                break
        run_steps(here, source, rows(0, 5))
        check_complete(here, source, 5)
    assert at > 20  # the steps make more calls than this, and all have been passed


def test_rows_of_a_resumed_training_are_sent_once(out: str) -> None:
    """Training went to step 7, was killed, resumed from the checkpoint at 5; MLflow had seen 7."""
    live = storage.join(out, "train", "metrics.jsonl")
    storage.write_bytes(live, rows(0, 8))
    first = tracker(out)
    handle = first._handle("train", StepConfig(), {})
    assert handle.tail()
    assert handle.tail()
    storage.write_bytes(live, rows(0, 5))
    assert handle.tail()  # the same process sees the file cut back
    second = tracker(out)  # and another one
    with second.step("train", StepConfig()) as resumed:
        storage.write_bytes(live, rows(0, 6))
        assert resumed.tail()
        storage.write_bytes(live, rows(0, 10) + b'{"step": 10, "lo')  # a row being written
        assert resumed.tail()
    assert resumed.run_id == handle.run_id
    assert history(out, resumed.run_id, "loss") == [(step, 1.0 / (step + 1)) for step in range(10)]


# -- outages --------------------------------------------------------------------------------------------------------


def test_dead_server_never_raises_and_costs_seconds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path)
    source = source_artifact(out)
    storage.write_bytes(storage.join(out, "train", "metrics.jsonl"), rows(0, 5))
    started = time.monotonic()
    tracking = tracker(out, uri="http://127.0.0.1:9")  # the discard port: no listener
    with caplog.at_level(logging.WARNING), tracking.step("train", StepConfig(), {"prepare": source}) as handle:
        for _ in range(20):
            assert not handle.tail()
        assert handle.run_id is None
    assert not tracking.close()
    assert time.monotonic() - started < 15
    assert len([record for record in caplog.records if "MLflow failed" in record.message]) == 1


def test_silent_server_costs_seconds(tmp_path: Path) -> None:
    """A server that accepts and says nothing is the slow kind of dead."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        tracking = tracker(str(tmp_path), uri=f"http://127.0.0.1:{listener.getsockname()[1]}")
        started = time.monotonic()
        with tracking.step("train", StepConfig()) as handle:
            for _ in range(10):
                assert not handle.tail()
        assert time.monotonic() - started < 10


def test_backlog_is_sent_when_the_store_is_back(out: str, caplog: pytest.LogCaptureFixture) -> None:
    source = source_artifact(out)
    database, away = Path(out, "mlflow.db"), Path(out, "away.db")
    tracking = tracker(out)
    with tracking.step("prepare", StepConfig(steps=1)) as handle:
        handle.finish(source)
    database.rename(away)
    database.mkdir()  # SQLite cannot open a directory: every call fails
    with tracking.step("train", StepConfig(), {"prepare": source}) as handle:
        storage.write_bytes(storage.join(out, "live.jsonl"), rows(0, 3))
        assert not handle.tail(storage.join(out, "live.jsonl"))
        assert not handle.finish(train(out, source, rows(0, 5)))
    assert not tracking.sync()
    database.rmdir()
    away.rename(database)
    assert tracking.close()
    check_complete(out, source, 5)


def test_next_run_sends_what_the_last_could_not(out: str) -> None:
    source = source_artifact(out)
    database, away = Path(out, "mlflow.db"), Path(out, "away.db")
    database.rename(away)
    database.mkdir()
    run_steps(out, source, rows(0, 5))
    database.rmdir()
    away.rename(database)
    assert all_runs(out) == {}
    assert tracker(out).close()
    check_complete(out, source, 5)


# -- where ----------------------------------------------------------------------------------------------------------


def test_store_of_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    own = resolve_store(None, str(tmp_path))
    assert own.configured is None
    assert own.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert own.artifact_root == (tmp_path / "mlartifacts").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own.uri)  # as a user sets it to look at the run, then runs it again
    assert resolve_store(None, str(tmp_path)) == own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert resolve_store(None, "s3://bucket/out").uri == "http://tracking:5000"
    assert resolve_store("http://other", str(tmp_path)).uri == "http://other"


def test_remote_output_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"memory://out.*tracking.uri"):
        resolve_store(None, "memory://out")


def test_config_does_not_import_mlflow() -> None:
    code = "import nvembed.tracking.tracker, nvembed.registry.step, nvembed.registry.describe, sys; "
    code += "print(sorted({'mlflow', 'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# -- pure parts -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 60), max_size=12), st.lists(st.integers(1, 400), max_size=12))
def test_follower_gives_every_complete_row_once(steps: list[int], cuts: list[int]) -> None:
    """However the writes are cut, committed reads give each row once, in order."""
    import tempfile

    data = b"".join(json.dumps({"step": step, "loss": 0.5}).encode() + b"\n" for step in steps)
    follower, seen = Follower(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.jsonl")
        for cut in [*sorted(cuts), len(data)]:
            path.write_bytes(data[:cut])
            seen += [row["step"] for row in follower.read(str(path))]
            follower.commit()
    assert seen == steps


def test_follower_repeats_what_was_not_committed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(rows(0, 2))
    follower = Follower()
    assert [row["step"] for row in follower.read(str(path))] == [0, 1]
    assert [row["step"] for row in follower.read(str(path))] == [0, 1]
    follower.commit()
    assert follower.read(str(path)) == []


def test_follower_says_which_line_is_no_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(rows(0, 1) + b'{"step": 1, "lo{"step": 2}\n' + rows(3, 4))
    assert [row["step"] for row in Follower().read(str(path))] == [0, 3]
    assert "metrics.jsonl" in caplog.text


def test_flatten_and_numbers() -> None:
    assert flatten({"a": {"b": [1, 2], "c": [{"d": None}]}, "e f@g": "x", "h": {}}) == {
        "a.b": "[1, 2]",
        "a.c.0.d": "null",
        "e f_g": "x",
        "h": "{}",
    }
    assert numbers({"a": {"b": 1, "t": "text", "flag": True, "n": None}, "c@2": 0.5}) == {"a/b": 1.0, "c_2": 0.5}
