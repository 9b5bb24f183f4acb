"""Classes whose labels are the documents: mining passes on what the data set says, and the stream lays it out."""

import json
from pathlib import Path
from typing import Any

import mining_kit

from nvembed.core import storage
from nvembed.core.parquet import read_table
from nvembed.data.config import FilesSource, PrepareConfig
from nvembed.data.prepare import PREPARE
from nvembed.data.tables import dataset_info, read_corpus
from nvembed.mining.config import MineConfig
from nvembed.mining.layout import ClassesTask, MinePaths, task_to_json
from nvembed.mining.step import mine_step
from nvembed.mining.worker import MineWorker
from nvembed.stream.steps import _files
from nvembed.types import Artifact

LABELS = [f"label {number}" for number in range(6)]


def prepared(tmp_path: Path, positives_from: Any) -> Artifact:
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"text of number {i}", "label": LABELS[i % 6]}) for i in range(200)]
    rows.write_text("\n".join(lines))
    source = FilesSource(
        name="mine", instruction="intent", uris=(str(rows),), task="classification", positives_from=positives_from
    )
    return PREPARE.run(PrepareConfig(sources=(source,)), {}, str(tmp_path / "prepare"))


def mined(prepare: Artifact, tmp_path: Path) -> list[dict[str, Any]]:
    paths = MinePaths.under(str(tmp_path / "mine"))
    uri = prepare.path("mine", "examples-train.parquet")
    task = ClassesTask("mine", "part-0", dataset_info(prepare)["mine"]["train"], uri, 0)
    MineWorker(MineConfig(num_negatives=3), paths).work(task_to_json(task))
    rows: list[dict[str, Any]] = read_table(storage.join(paths.select, "mine", "part-0.parquet")).to_pylist()
    return rows


def test_labels_are_positives_and_negatives(tmp_path: Path) -> None:
    prepare = prepared(tmp_path, "labels")
    corpus = {row["id"]: row for row in read_corpus(prepare, "mine").to_pylist()}
    rows = mined(prepare, tmp_path)
    assert len(rows) == dataset_info(prepare)["mine"]["train"] > 100
    seen = set()
    for row in rows:
        label = corpus[row["example_id"]]["label"]
        assert [corpus[item["id"]]["text"] for item in row["positives"]] == [label]
        others = [corpus[item["id"]]["text"] for item in row["negatives"]]
        assert len(set(others)) == 3 and set(others) <= set(LABELS) - {label}
        assert set(row["known_positives"]) == {row["example_id"], row["positives"][0]["id"]}
        seen |= set(others)
    assert seen == set(LABELS)
    assert mined(prepare, tmp_path / "again") == rows


def test_a_label_carries_no_instruction_and_an_example_does(tmp_path: Path) -> None:
    for kind, symmetric in (("labels", False), ("examples", True)):
        (tmp_path / kind).mkdir()
        prepare = prepared(tmp_path / kind, kind)
        mine = Artifact(str(tmp_path / kind / "mine"), {})
        storage.write_bytes(mine.path("mine", "mined.parquet"), b"")
        files = _files("mine", dataset_info(prepare)["mine"], {"prepare": prepare, "mine": mine})
        assert files.symmetric == symmetric


def test_examples_are_drawn_where_the_set_gives_none(tmp_path: Path) -> None:
    prepare = prepared(tmp_path, "examples")
    label = {row["id"]: row["label"] for row in read_corpus(prepare, "mine").to_pylist()}
    for row in mined(prepare, tmp_path):
        assert label[row["positives"][0]["id"]] == label[row["example_id"]]
        assert all(label[item["id"]] != label[row["example_id"]] for item in row["negatives"])


def test_a_cap_on_documents_counts_labelled_examples_once(tmp_path: Path) -> None:
    step = mine_step(encode=mining_kit.encode, pool=mining_kit.pool)
    prepare = prepared(tmp_path, "examples")
    for cap in (None, 5):
        config = MineConfig(num_negatives=3, max_per_document=cap)
        artifact = step.run(config, {"prepare": prepare}, str(tmp_path / f"mine-{cap}"))
        audit = storage.read_json(artifact.path("audit.json"))["datasets"]["mine"]
        rows = read_table(artifact.path("mine", "mined.parquet")).num_rows
        assert audit["mined"] == sum(audit["negatives_per_example"].values()) == rows
