"""Rows with labels and grades: construction, splits, bad rows, and the ways back."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nvembed.data.config import FilesSource, HubSource, PrepareConfig
from nvembed.data.prepare import PREPARE
from nvembed.data.sources.base import SourceRows
from nvembed.data.sources.files import read_files
from nvembed.data.sources.hub import read_hub
from nvembed.data.sources.labelled import graded_to_rows, labelled_to_rows
from nvembed.data.sources.rows import RawRow
from nvembed.data.tables import SPLITS, dataset_info, read_corpus, read_examples
from nvembed.data.writers import write_graded, write_labelled
from nvembed.types import TaskType, UserError

LABELS = ("joy", "anger", "fear")
LABELLED = [{"text": f"a sentence about {i} things", "label": LABELS[i % 3]} for i in range(90)]
GRADED = [{"sentence1": f"the cat {i}", "sentence2": f"a cat {i}", "score": i % 6} for i in range(90)]


def source(path: Path, **options: Any) -> FilesSource:
    return FilesSource(name="mine", instruction="sentiment", uris=(str(path),), **options)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def everything(rows: SourceRows) -> list[Any]:
    return [row for split in SPLITS for row in rows.examples[split]]


def content(rows: SourceRows) -> set[tuple[Any, ...]]:
    return {(row.query, row.label) for row in everything(rows)}


@pytest.mark.parametrize("task", ["classification", "clustering"])
def test_examples_of_classes_leave_positives_to_mining(tmp_path: Path, task: Any) -> None:
    rows = read_files(source(write_lines(tmp_path / "rows.jsonl", LABELLED), task=task))
    assert rows.task is TaskType(task) and rows.positives_from == "examples"
    assert content(rows) == {(row["text"], row["label"]) for row in LABELLED}
    assert len(rows.documents) == 90 and all(row.label in LABELS and row.split in SPLITS for row in rows.documents)
    assert not any(row.positives or row.negatives for row in everything(rows))
    splits_of = {row.id: row.split for row in rows.documents}
    assert all(splits_of[row.id] == split for split in SPLITS for row in rows.examples[split])


def test_labels_as_documents(tmp_path: Path) -> None:
    given_texts = {"joy": "The writer is happy.", "fear": "The writer is afraid."}
    config = source(
        write_lines(tmp_path / "rows.jsonl", LABELLED),
        task="classification", positives_from="labels", label_texts=given_texts,
    )  # fmt: skip
    rows = read_files(config)
    texts = {row.id: row.text for row in rows.documents}
    labels = {"joy": "The writer is happy.", "fear": "The writer is afraid.", "anger": "anger"}
    assert len(texts) == 93
    for row in rows.examples["train"]:
        assert [texts[item.id] for item in row.positives] == [labels[row.label]]
        assert {texts[item.id] for item in row.negatives} == set(labels.values()) - {labels[row.label]}
    assert not any(row.positives for split in ("dev", "test") for row in rows.examples[split])


def test_labels_reach_the_artifact_and_keep_their_documents(tmp_path: Path) -> None:
    config = source(
        write_lines(tmp_path / "rows.jsonl", LABELLED), task="classification", positives_from="labels", max_train=30,
        max_test=5,
    )  # fmt: skip
    artifact = PREPARE.run(PrepareConfig(sources=(config,)), {}, str(tmp_path / "out"))
    info = dataset_info(artifact)["mine"]
    assert info["positives_from"] == "labels" and info["task"] == "classification" and info["test"] == 5
    corpus = {row["id"]: row for row in read_corpus(artifact, "mine").to_pylist()}
    assert sum(key.startswith("label-") for key in corpus) == 3
    train = read_examples(artifact, "mine", "train")
    assert len(train) == 30
    assert all(corpus[row.positives[0].id]["text"] == row.label and len(row.negatives) == 2 for row in train)


def test_wrong_labels_are_errors(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", LABELLED)
    with pytest.raises(
        UserError, match=r"label_texts names sadness, which no row has; its labels are anger, fear, joy"
    ):
        read_files(source(path, task="clustering", positives_from="labels", label_texts={"sadness": "x"}))
    with pytest.raises(UserError, match="two labels have one text"):
        read_files(source(path, task="clustering", positives_from="labels", label_texts={"joy": "fear"}))
    with pytest.raises(UserError, match=r"columns text, label\. Needed: sentence1"):
        (tmp_path / "rows.csv").write_text("text,label\na,b\n")
        read_files(source(tmp_path / "rows.csv", task="sts"))
    with pytest.raises(ValidationError, match="for classes and clusters"):
        source(path, positives_from="labels")


def test_bad_labelled_rows() -> None:
    columns: list[dict[str, Any]] = [
        {"text": "good", "label": "a"}, {"text": "good", "label": "b"}, {"text": "good", "label": "a"},
        {"text": " ", "label": "a"}, {"text": "other"}, {"label": "a"}, {"text": "number", "label": 7},
        {"text": "yes", "label": True}, {"text": "\ud800", "label": "a"}, {"text": "7", "label": "a"},
    ]  # fmt: skip
    raw = [RawRow("f", line, row) for line, row in enumerate(columns, start=1)]
    rows = labelled_to_rows(raw, source(Path("f"), task="classification", positives_from="labels"))
    assert content(rows) == {("good", "a"), ("number", "7")}
    assert {(row["line"], row["reason"]) for row in rows.rejects.listed} == {
        (2, "text has another label already"), (4, "text empty"), (5, "label missing"), (6, "text missing"),
        (8, "label is not text"), (9, "text is not UTF-8"), (0, "text is that of a label"),
    }  # fmt: skip


def test_graded_pairs_in_both_directions(tmp_path: Path) -> None:
    rows = read_files(source(write_lines(tmp_path / "r.jsonl", GRADED), task="sts", score_range=(0, 5)))
    texts = {row.id: row.text for row in rows.documents}
    pairs = {split: {(r.query, texts[r.positives[0].id]) for r in rows.examples[split]} for split in SPLITS}
    assert {(b, a) for a, b in pairs["train"]} == pairs["train"]
    assert not {(b, a) for a, b in pairs["test"]} & pairs["test"]
    assert sum(len(result) for result in pairs.values()) == 90 + len(pairs["train"]) // 2
    scores = {row.query: row.positives[0].score for row in everything(rows)}
    assert all(scores[row["sentence1"]] == row["score"] / 5 for row in GRADED)


def test_bad_graded_rows() -> None:
    columns: list[dict[str, Any]] = [
        {"sentence1": "a", "sentence2": "b", "score": "0.5"}, {"sentence1": "b", "sentence2": "a", "score": 0.4},
        {"sentence1": "a", "sentence2": "a", "score": 1}, {"sentence1": "a", "sentence2": "c", "score": 1.5},
        {"sentence1": "a", "sentence2": "d", "score": "high"}, {"sentence1": "a", "sentence2": "e", "score": "nan"},
        {"sentence1": "a", "sentence2": "f"}, {"sentence1": "a", "sentence2": " ", "score": 1},
    ]  # fmt: skip
    raw = [RawRow("f", line, row) for line, row in enumerate(columns, start=1)]
    rows = graded_to_rows(raw, source(Path("f"), task="sts"))
    assert {row.query for row in everything(rows)} <= {"a", "b"}
    assert [(row["line"], row["reason"]) for row in rows.rejects.listed] == [
        (2, "pair twice"), (3, "both texts are the same"), (4, "score outside 0 to 1"), (5, "score is not a number"),
        (6, "score is not a number"), (7, "score missing"), (8, "sentence2 empty"),
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.floats(0, 1)), max_size=50))
def test_no_text_of_a_pair_is_in_two_splits(numbers: list[tuple[int, int, float]]) -> None:
    columns = [{"sentence1": f"t{a}", "sentence2": f"t{b}", "score": score} for a, b, score in numbers]
    raw = [RawRow("f", line, row) for line, row in enumerate(columns, start=1)]
    rows = graded_to_rows(raw, source(Path("f"), task="sts", test_share=0.3))
    splits_of: dict[str, set[str]] = {}
    for split in SPLITS:
        for row in rows.examples[split]:
            for key in row.id.split("~"):
                splits_of.setdefault(key, set()).add(split)
    assert all(len(result) == 1 for result in splits_of.values())
    assert {row.id: row.split for row in rows.documents} == {
        key: next(iter(result)) for key, result in splits_of.items()
    }


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.zst", "csv", "tsv.gz", "parquet", ""])
def test_labelled_and_graded_rows_round_trip(tmp_path: Path, ending: str) -> None:
    def back(name: str, **options: Any) -> SourceRows:
        if ending:
            return read_files(source(tmp_path / f"{name}.{ending}", **options))
        return read_hub(HubSource(name="mine", instruction="sentiment", path=str(tmp_path / name), **options))

    classes = read_files(source(write_lines(tmp_path / "a.jsonl", LABELLED), task="clustering"))
    write_labelled(classes.documents, everything(classes), str(tmp_path / "classes") + ("." + ending if ending else ""))
    assert back("classes", task="clustering").examples == classes.examples
    pairs = read_files(source(write_lines(tmp_path / "b.jsonl", GRADED), task="sts", score_range=(0, 5)))
    write_graded(pairs.documents, everything(pairs), str(tmp_path / "pairs") + ("." + ending if ending else ""))
    again = back("pairs", task="sts")
    assert {row.id: row for row in everything(again)} == {row.id: row for row in everything(pairs)}


def test_class_numbers_of_a_saved_folder_become_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "kind": datasets.ClassLabel(names=list(LABELS))}
    )
    rows = {"sentence": [row["text"] for row in LABELLED], "kind": [i % 3 for i in range(89)] + [-1]}
    saved = datasets.DatasetDict({"training": datasets.Dataset.from_dict(rows, features)})
    saved.save_to_disk(str(tmp_path / "set"))
    options: dict[str, Any] = {"path": str(tmp_path / "set"), "task": "classification"}
    config = HubSource(
        name="m", instruction="topic", split="training", columns={"text": "sentence", "label": "kind"}, **options
    )
    read = read_hub(config)
    assert content(read) == {(row["text"], row["label"]) for row in LABELLED[:-1]}
    assert read.rejects.listed == [{"file": f"hub:{tmp_path / 'set'}", "line": 90, "reason": "label missing"}]
    with pytest.raises(UserError, match="`columns` maps nowhere, which is not there"):
        read_hub(config.model_copy(update={"columns": {"text": "nowhere"}}))
