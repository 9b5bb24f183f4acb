"""Data sets of a `prepare` artifact, written in every format and read back."""

import json
from pathlib import Path
from typing import Any

import pytest

from nvembed.data.config import BeirSource, FilesSource, PrepareConfig
from nvembed.data.prepare import PREPARE
from nvembed.data.sources.beir import read_beir
from nvembed.data.sources.files import read_files
from nvembed.data.tables import SPLITS, read_corpus, read_examples
from nvembed.data.writers import FORMATS, write_dataset
from nvembed.types import Artifact, UserError

ROWS: dict[str, list[dict[str, Any]]] = {
    "retrieval": [{"query": f"question {i}", "positive": f"answer {i}", "negative": f"other {i}"} for i in range(60)],
    "classification": [{"text": f"text {i}", "label": f"class {i % 12}"} for i in range(120)],
    "sts": [{"sentence1": f"left {i}", "sentence2": f"right {i}", "score": i % 5 / 4} for i in range(60)],
}
TASKS = {"labelled": "classification", "graded": "sts"}  # the other formats hold retrieval examples


def source(name: str, path: Path, task: str) -> FilesSource:
    return FilesSource(name=name, instruction="web_search", uris=(str(path),), task=task, test_share=0.2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("writers")
    for task, rows in ROWS.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = tuple(source(task, folder / f"{task}.jsonl", task) for task in ROWS)
    return PREPARE.run(PrepareConfig(sources=sources, contained_words=None), {}, str(folder / "prepare"))


def texts(artifact: Artifact, dataset: str) -> set[tuple[str, ...]]:
    """Query, label and texts of the positives of every example."""
    text = {row["id"]: row["text"] for row in read_corpus(artifact, dataset).to_pylist()}
    rows = [row for split in SPLITS for row in read_examples(artifact, dataset, split)]
    return {(row.query, row.label or "", *(text[item.id] for item in row.positives)) for row in rows}


@pytest.mark.parametrize("format", FORMATS)
def test_a_data_set_is_read_back_from_every_format(prepared: Artifact, tmp_path: Path, format: str) -> None:
    task = TASKS.get(format, "retrieval")
    expected = texts(prepared, task)
    uri = tmp_path / "out" / ("" if format == "beir" else "rows.jsonl")
    write_dataset(prepared, task, None, format, str(uri))
    if format == "beir":
        read = read_beir(BeirSource(name="back", instruction="web_search", uri=str(uri)))
    else:
        read = read_files(source("back", uri, task))
    text = {row.id: row.text for row in read.documents}
    rows = [row for examples in read.examples.values() for row in examples]
    assert {(row.query, row.label or "", *(text[item.id] for item in row.positives)) for row in rows} == expected


def test_a_split_is_written_alone(prepared: Artifact, tmp_path: Path) -> None:
    write_dataset(prepared, "retrieval", "dev", "sentence-transformers", str(tmp_path / "dev.jsonl"))
    anchors = {json.loads(line)["anchor"] for line in (tmp_path / "dev.jsonl").read_text().splitlines()}
    assert anchors == {row.query for row in read_examples(prepared, "retrieval", "dev")}


def test_what_cannot_be_written_is_named(prepared: Artifact, tmp_path: Path) -> None:
    uri = str(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"format 'tevatrn': choose one of beir, .* Did you mean 'tevatron'\?"):
        write_dataset(prepared, "retrieval", "train", "tevatrn", uri)
    with pytest.raises(UserError, match=r"data set 'nowhere' is not in .* it holds retrieval, classification, sts"):
        write_dataset(prepared, "nowhere", "train", "tevatron", uri)
    with pytest.raises(UserError, match="split 'all' of retrieval: choose one of train, dev, test"):
        write_dataset(prepared, "retrieval", "all", "tevatron", uri)
    with pytest.raises(UserError, match="sts examples cannot be written in this format"):
        write_dataset(prepared, "sts", "train", "tevatron", uri)
    assert not list(tmp_path.iterdir())
