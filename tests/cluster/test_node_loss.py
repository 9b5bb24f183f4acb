"""The tiny recipe on a simulated cluster that loses nodes, as a user runs it: RAY_ADDRESS and a token, nothing else.

About 6 minutes on 2 idle cores. The reference is the same recipe on a private local Ray, up to the first stage.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cluster_kit import ROOT, SimulatedCluster, simulated_cluster

TINY = ROOT / "pipelines/recipes/tiny.yaml"
WORKER, ACTOR = "ray::RayTrainWorker", "ray::MapWorker"

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def start(out: Path, environment: Mapping[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "pipelines/quickstart.py"), str(TINY), "--out", str(out), *arguments]
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, text=True, env=dict(environment), cwd=out.parent
        )


def said(out: Path) -> str:
    return out.with_suffix(".log").read_text()


def until(condition: Callable[[], Any], process: subprocess.Popen[str], out: Path, seconds: float = 900) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < deadline, said(out)[-4000:]
        time.sleep(0.1)
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def lose_node(cluster: SimulatedCluster, title: str, process: subprocess.Popen[str], out: Path) -> int:
    """Remove the node on which such a process runs, put a new one in its place."""

    def found() -> list[int]:
        node = cluster.node_of(title)
        return [] if node is None else [node]

    node = until(found, process, out)[0]
    cluster.remove(node)
    cluster.add(2)
    return int(node)


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimulatedCluster]:
    with simulated_cluster([2, 2]) as made:
        yield made


@pytest.mark.timeout(2400)
def test_a_run_survives_the_loss_of_nodes_and_gives_what_it_gives_without(
    cluster: SimulatedCluster, tmp_path: Path
) -> None:
    out, alone = tmp_path / "lost", tmp_path / "alone"
    process = start(out, cluster.environment)
    until((out / "mine/.step.json").exists, process, out)
    lose_node(cluster, ACTOR, process, out)
    stage = out / "train_stage_1"
    until(lambda: (stage / "checkpoints/step-000004/manifest.json").exists(), process, out)
    until(lambda: len(rows(stage / "metrics.jsonl")) >= 5, process, out)
    assert not (stage / "manifest.json").exists()
    lose_node(cluster, WORKER, process, out)
    assert process.wait(timeout=1500) == 0, said(out)[-4000:]

    starts = [row["step"] for row in rows(stage / "starts.jsonl")]
    assert starts[0] == 0 and starts[-1] >= 4 and len(starts) >= 2, starts
    for name, steps in (("train_stage_1", 10), ("train_stage_2", 6), ("train_student", 8)):
        assert [row["step"] for row in rows(out / name / "metrics.jsonl")] == list(range(steps))
    assert cluster.alive(), "the run must leave another user's cluster as it was"

    quiet = {name: value for name, value in cluster.environment.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    reference = start(alone, quiet)
    until((alone / "train_stage_1/manifest.json").exists, reference, alone)
    reference.send_signal(signal.SIGINT)
    assert reference.wait(timeout=60) == 130
    keep = ("step", "loss", "grad_norm", "lr", "sample_ids_sha256")
    ours, theirs = (
        [{key: row[key] for key in keep} for row in rows(place / "train_stage_1/metrics.jsonl")]
        for place in (out, alone)
    )
    assert ours == theirs, "bit-equal to the run that lost nothing"
    for name in ("cwe/mined.parquet", "hpo/mined.parquet", "code/mined.parquet"):
        assert (out / "mine" / name).read_bytes() == (alone / "mine" / name).read_bytes()
    weights = [(place / "train_stage_1/model/model.safetensors").read_bytes() for place in (out, alone)]
    assert weights[0] == weights[1]


@pytest.mark.timeout(600)
def test_ctrl_c_ends_the_run_and_not_the_cluster(cluster: SimulatedCluster, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    process = start(out, cluster.environment)
    until(lambda: (out / "mine/.step.json").exists() and cluster.node_of(ACTOR) is not None, process, out, 400)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, said(out)[-3000:]
    assert cluster.alive()
    deadline = time.monotonic() + 60
    while cluster.node_of(ACTOR) is not None and time.monotonic() < deadline:
        time.sleep(0.5)
    assert cluster.node_of(ACTOR) is None, "actors of the stopped run are left"


# -- preflight ----------------------------------------------------------------------------------------------------


def preflight(cluster: SimulatedCluster, out: Path | str, *arguments: str, **variables: str | None) -> tuple[int, Any]:
    environment = {**cluster.environment, **variables}
    command = [sys.executable, "-m", "nvembed.cli", "preflight", str(TINY), "--out", str(out), "--json", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=cluster.folder,
        env={name: value for name, value in environment.items() if value is not None},
    )  # fmt: skip
    assert done.stdout.startswith("["), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


def problems(findings: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    return {finding["check"]: finding for finding in findings if finding["state"] == "problem"}


@pytest.mark.timeout(600)
def test_preflight_finds_a_good_cluster_good(cluster: SimulatedCluster, tmp_path: Path) -> None:
    code, findings = preflight(cluster, tmp_path / "out")
    assert code == 0, findings
    checks = {finding["check"] for finding in findings}
    wanted = {"nodes", "storage", "versions", "network", "authentication", "dashboard", "object store", "clock", "room"}
    assert wanted <= checks
    assert not (tmp_path / "out").exists(), "what the check made is gone"
    assert cluster.alive()


@pytest.mark.timeout(600)
def test_preflight_lists_every_problem_at_once(cluster: SimulatedCluster, tmp_path: Path) -> None:
    code, findings = preflight(
        cluster,
        tmp_path / "out",
        "--set", "stage_1.train.gpus_per_worker=1",
        "--set", "mine.retriever={type: package, package: no-such-package}",
        "--set", "baselines.reference={type: pretrained, name: /no/such/folder}",
        "--set", "stage_2.train.num_workers=16",
    )  # fmt: skip
    found = problems(findings)
    assert code == 3
    assert {"packages", "model baselines.reference", "room"} <= set(found)
    assert all(finding["fix"] for finding in found.values())
    rooms = [finding["said"] for finding in findings if finding["check"] == "room"]
    assert any("stage_1.train" in line and "GPU" in line for line in rooms)
    assert any("stage_2.train" in line and "CPU" in line for line in rooms)


@pytest.mark.timeout(600)
def test_preflight_refuses_an_output_that_the_nodes_cannot_write(cluster: SimulatedCluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, findings = preflight(cluster, tmp_path / "file/out")
    assert code == 3 and "storage" in problems(findings) and "output" in problems(findings)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("token", ["0" * 64, None])
def test_preflight_without_the_token_says_so(cluster: SimulatedCluster, tmp_path: Path, token: str | None) -> None:
    code, findings = preflight(cluster, tmp_path / "out", RAY_AUTH_TOKEN=token, HOME=str(tmp_path))
    assert code == 3 and "RAY_AUTH_TOKEN" in problems(findings)["cluster"]["fix"]


@pytest.mark.timeout(600)
def test_preflight_finds_a_cluster_without_authentication(tmp_path: Path) -> None:
    with simulated_cluster([1], RAY_AUTH_MODE="disabled") as cluster:
        code, findings = preflight(cluster, tmp_path / "out")
        said = [finding["said"] for finding in findings if finding["check"] == "authentication"]
        assert code == 3 and any("off on" in line for line in said)
        process = start(tmp_path / "run", cluster.environment)
        assert process.wait(timeout=200) == 3
        assert not (tmp_path / "run/recipe.yaml").exists(), "a recipe that cannot run yet is not stored"


@pytest.mark.timeout(600)
def test_preflight_sees_nodes_that_share_no_storage(cluster: SimulatedCluster, tmp_path: Path) -> None:
    """`memory://` is a store per process: what one node writes there no other sees."""
    code, findings = preflight(cluster, "memory://nowhere")
    assert code == 3 and "not seen by the driver" in problems(findings)["storage"]["said"]
