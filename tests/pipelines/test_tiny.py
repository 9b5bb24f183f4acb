"""The quickstart on the tiny recipe, as a user runs it: a subprocess, real Ray, DeepSpeed and MLflow."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "pipelines/recipes/tiny.yaml"
PRIMARY = {"cwe": "ndcg_at_10", "hpo": "ndcg_at_10", "code": "ndcg_at_10"}
STEPS = [
    "prepare", "initialise", "mine", "stream_stage_1", "train_stage_1", "stream_stage_2", "train_stage_2", "baselines",
    "evaluate_teacher", "register_teacher", "teacher_embeddings", "student_init", "evaluate_student_init",
    "stream_student", "train_student", "evaluate_student", "compare_student", "register_student",
]  # fmt: skip


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the quickstart in its own process group, output to a file beside `out`."""
    command = [sys.executable, str(ROOT / "pipelines/quickstart.py"), str(TINY), "--out", str(out), *arguments]
    with open(out.parent / f"log-{time.time_ns()}.txt", "w") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=out.parent
        )


def logs(out: Path) -> str:
    """Everything the runs of this output printed."""
    return "\n".join(path.read_text() for path in sorted(out.parent.glob("log-*.txt")))


def metrics(out: Path, step: str) -> list[dict]:
    path = out / step / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run of the tiny recipe."""
    out = tmp_path_factory.mktemp("quickstart") / "tiny"
    process = start(out)
    assert process.wait(timeout=600) == 0, logs(out)[-6000:]
    return out


@pytest.mark.ray
@pytest.mark.timeout(700)
def test_report_holds_what_outside_checks_rely_on(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["schema_version"] and report["recipe"] == "tiny"
    assert [step["name"] for step in report["steps"] if step["name"] != "report"] == STEPS
    assert {step["status"] for step in report["steps"]} == {"done"}
    assert all(step["seconds"] >= 0 and step["peak_pss_mb"] > 0 and step["artifact"] for step in report["steps"])
    assert set(report["baselines"]) == {"bm25", "minilm", "untrained"}
    assert {"teacher", "student", "student@32"} <= set(report["scores"])
    for system in report["scores"].values():
        for dataset, metric in PRIMARY.items():
            assert next(iter(system[dataset])) == metric, "the primary metric comes first"
        for values in system.values():
            assert all(0 <= v["low"] <= v["value"] <= v["high"] <= 1 for k, v in values.items() if k != "spearman")
    for model in ("teacher", "student"):
        folder = Path(report["models"][model]["folder"])
        assert folder.is_absolute() and (folder / "model.safetensors").exists()
        assert report["models"][model]["registry_uri"].startswith("models:/")
    assert 0 < report["peak_pss_mb"] < 8 * 1024 and report["wall_seconds"] > 0


@pytest.mark.ray
@pytest.mark.timeout(700)
def test_every_optimiser_step_is_in_the_metrics_once(finished: Path) -> None:
    for step, expected in (("train_stage_1", 10), ("train_stage_2", 6), ("train_student", 8)):
        lines = metrics(finished, step)
        assert [line["step"] for line in lines] == list(range(expected))
        for line in lines:
            assert {"loss", "lr", "grad_norm", "sample_ids_sha256"} <= set(line)
            assert re.fullmatch(r"[0-9a-f]{64}", line["sample_ids_sha256"])


@pytest.mark.ray
@pytest.mark.timeout(700)
def test_a_second_run_skips_every_step(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/manifest.json")}
    process = start(finished)
    assert process.wait(timeout=300) == 0, logs(finished)[-4000:]
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/manifest.json")} == before
    report = json.loads((finished / "report.json").read_text())
    assert {step["status"] for step in report["steps"] if step["name"] != "report"} == {"skipped"}


@pytest.mark.ray
@pytest.mark.timeout(700)
def test_a_changed_recipe_is_refused_with_the_difference(finished: Path) -> None:
    process = start(finished, "--set", "stage_1.train.seed=99")
    assert process.wait(timeout=120) == 2
    assert re.search(r"stage_1\.train\.seed: 17 -> 99", logs(finished))


@pytest.mark.ray
@pytest.mark.timeout(700)
def test_a_corrupt_artifact_is_refused(finished: Path) -> None:
    victim = next((finished / "mine").glob("*/mined.parquet"))
    whole = victim.read_bytes()
    try:
        victim.write_bytes(whole[:-100])
        process = start(finished)
        assert process.wait(timeout=120) == 2
        assert "is corrupt" in logs(finished) and "mined.parquet" in logs(finished)
    finally:
        victim.write_bytes(whole)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("place", ["train_stage_1:4", "train_stage_2:2", "mine", "teacher_embeddings"])
def test_a_killed_driver_resumes_to_the_same_bytes(finished: Path, tmp_path: Path, place: str) -> None:
    out = tmp_path / "tiny"
    process = start(out)
    step, _, at = place.partition(":")
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        reached = len(metrics(out, step)) >= int(at) if at else (out / step / ".step.json").exists()
        if reached or process.poll() is not None:
            break
        time.sleep(0.02)
    assert process.poll() is None and not (out / step / "manifest.json").exists(), logs(out)[-3000:]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = start(out)
    assert again.wait(timeout=900) == 0, logs(out)[-6000:]
    for training in ("train_stage_1", "train_stage_2", "train_student"):
        keep = ("step", "loss", "grad_norm", "lr", "sample_ids_sha256")
        ours, theirs = ([{k: line[k] for k in keep} for line in metrics(o, training)] for o in (out, finished))
        assert ours == theirs
        weights = [(o / training / "model/model.safetensors").read_bytes() for o in (out, finished)]
        assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_ctrl_c_stops_within_seconds_with_130_and_a_second_run_is_refused_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    process = start(out)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (out / "mine/.step.json").exists() and process.poll() is None:
        time.sleep(0.1)
    second = start(out)
    assert second.wait(timeout=60) == 2
    assert re.search(rf"in use by .* pid {process.pid}\b", logs(out))
    requested = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, logs(out)[-3000:]
    assert time.monotonic() - requested < 20
    assert "Traceback" not in logs(out)
