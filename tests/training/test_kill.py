"""kill -9 of a worker or of the driver under real Ray Train: where the run goes on, and that nothing differs.

The starting step is asserted, not only that the run ends well: Ray would start at 0 although the checkpoint lies on
disk (STACK.md 5). The uninterrupted run it is compared with has no Ray in it at all: two plain gloo ranks.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from kill_kit import drive_once
from training_kit import run_ranks, tiny_start, tiny_stream

STEPS = 6
DRIVER_SECONDS = 200
LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.2}


def settings(zero_stage: int = 2, precision: str = "bf16") -> dict[str, Any]:
    return {
        "objective": {"type": "contrastive", "learned_temperature": True, "temperature": 0.1},
        "adapter": LORA,
        "optimiser": {"learning_rate": 2e-3, "weight_decay": 0.1, "warmup_steps": 2, "eps": 1e-5},
        "engine": {"type": "deepspeed", "zero_stage": zero_stage},
        "precision": precision,
        "num_workers": 2,
        "token_budget": 120,
        "checkpoint_every": 2,
        "seed": 7,
    }


def rows(work: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in lines]


def starts(work: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (work / "starts.jsonl").read_text().splitlines()]


def weights(work: Path) -> dict[str, bytes]:
    files = [*work.glob("model/**/*.safetensors"), work / "objective.safetensors"]
    return {str(file.relative_to(work)): file.read_bytes() for file in files}


def uninterrupted(folder: Path, config: dict[str, Any]) -> Path:
    """The same stage on two plain ranks, never stopped."""
    model = folder / "start" / "model"
    jobs = {"whole": {"config": config, "model": str(model), "runs": [(f"{folder}/whole", None)]}}
    run_ranks("train", jobs, folder / "ranks")
    return folder / "whole"


def kill_and_resume(folder: Path, config: dict[str, Any], kill: dict[str, Any]) -> None:
    tiny_stream(folder / "stream", STEPS)
    tiny_start(folder / "start")
    first = drive_once(folder, config, kill)
    code = first.wait(timeout=DRIVER_SECONDS)
    log = (folder / "driver.log").read_text()
    assert (folder / "killed").exists(), log[-3000:]
    if kill["victim"].startswith("driver"):
        assert code == -signal.SIGKILL
        code = drive_once(folder, config, kill).wait(timeout=DRIVER_SECONDS)
    assert code == 0, (folder / "driver.log").read_text()[-3000:]


def assert_as_if_nothing_happened(folder: Path, config: dict[str, Any], *allowed: int) -> None:
    stage, whole = folder / "out" / "stage", uninterrupted(folder, config)
    assert starts(stage) in [[0, start] for start in allowed]
    assert [row["step"] for row in rows(stage)] == list(range(STEPS))
    assert rows(stage) == rows(whole)
    assert weights(stage) == weights(whole)
    assert (stage / "manifest.json").exists() and not (stage / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_kill_of_a_worker_mid_run(tmp_path: Path) -> None:
    config = settings()
    kill_and_resume(tmp_path, config, {"place": "after metrics", "step": 4, "victim": "rank0"})
    assert_as_if_nothing_happened(tmp_path, config, 4)


MATRIX = [
    ("before step", 0, 0), ("before step", 3, 2), ("after metrics", 3, 2), ("before save", 4, 2),
    ("between files", 2, 0), ("between files", 4, 2), ("before manifest", 4, 2), ("after manifest", 4, 4),
    ("in export", 0, 6),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("victim", ["rank0", "rank1", "driver"])
@pytest.mark.parametrize(("place", "step", "start"), MATRIX)
def test_kill_anywhere(tmp_path: Path, place: str, step: int, start: int, victim: str) -> None:
    if victim == "rank1" and place not in ("before step", "before save"):
        pytest.skip("only rank 0 comes by here")
    zero_stage = (step + MATRIX.index((place, step, start))) % 4
    config = settings(zero_stage, "fp32" if zero_stage % 2 else "bf16")
    kill_and_resume(tmp_path, config, {"place": place, "step": step, "victim": victim})
    assert_as_if_nothing_happened(tmp_path, config, start)


@pytest.mark.slow
@pytest.mark.ray
def test_workers_that_outlive_their_driver_for_a_moment_do_no_harm(tmp_path: Path) -> None:
    """They may save another checkpoint, or even the last one, until the next run takes the lease over."""
    config = settings()
    kill_and_resume(tmp_path, config, {"place": "before step", "step": 3, "victim": "driver, orphans go on"})
    assert_as_if_nothing_happened(tmp_path, config, 2, 4, 6)


@pytest.mark.slow
@pytest.mark.ray
def test_ctrl_c_stops_within_seconds_and_leaves_nothing_running(tmp_path: Path) -> None:
    tiny_stream(tmp_path / "stream", 400)
    tiny_start(tmp_path / "start")
    driver = drive_once(tmp_path, settings())
    metrics = tmp_path / "out" / "stage" / "metrics.jsonl"
    deadline = time.monotonic() + DRIVER_SECONDS
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "driver.log").read_text()[-3000:]
        time.sleep(0.2)
    children = psutil.Process(driver.pid).children(recursive=True)
    assert len(children) >= 4  # Ray's own and two workers
    asked = time.monotonic()
    driver.send_signal(signal.SIGINT)
    assert driver.wait(timeout=60) == 130
    assert time.monotonic() - asked < 15
    _, alive = psutil.wait_procs(children, timeout=15)
    assert alive == []
    assert not (tmp_path / "out" / "stage" / "manifest.json").exists()
