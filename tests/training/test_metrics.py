"""`metrics.jsonl`: each optimiser step exactly once, whatever was there before."""

import hashlib
import json
import logging
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.training.metrics import MetricsLog, hash_ids


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_hash_is_that_of_the_ids_one_per_line() -> None:
    assert hash_ids(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()
    assert hash_ids(["b", "a"]) != hash_ids(["a", "b"])


@settings(max_examples=40, deadline=None)
@given(written=st.integers(0, 8), start=st.integers(0, 8), torn=st.binary(max_size=12))
def test_resume_drops_later_steps_and_a_torn_line(tmp_path_factory, written: int, start: int, torn: bytes) -> None:
    start = min(start, written)
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    torn = torn.replace(b"\n", b"")
    path.write_bytes(b"".join(b'{"step": %d, "loss": 1.5}\n' % s for s in range(written)) + torn)
    log = MetricsLog(str(path), start)
    assert steps(path) == list(range(start))
    for step in range(start, 9):
        log.append({"step": step, "loss": 2.0})
        assert steps(path) == list(range(step + 1))  # visible at once, so a kill loses nothing
    log.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.5] * start + [2.0] * (9 - start)


def test_missing_earlier_steps_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    with caplog.at_level(logging.WARNING):
        MetricsLog(str(path), 3).close()
    assert "steps before 3 are not all there" in caplog.text
    assert steps(path) == [0]


def test_without_append_lines_appear_at_flush() -> None:
    uri = "memory://metrics-test/metrics.jsonl"
    log = MetricsLog(uri, 0)
    log.append({"step": 0})
    assert fsspec.filesystem("memory").cat("/metrics-test/metrics.jsonl") == b""
    log.flush()
    assert fsspec.filesystem("memory").cat("/metrics-test/metrics.jsonl") == b'{"step": 0}\n'
    log.append({"step": 1})
    log.close()
    again = MetricsLog(uri, 1)
    again.append({"step": 1, "again": True})
    again.close()
    lines = fsspec.filesystem("memory").cat("/metrics-test/metrics.jsonl").decode().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0}, {"step": 1, "again": True}]
