"""`nvembed data convert`: a prepared data set in other formats, read back by `prepare`'s own readers."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nvembed.commands.app import app
from nvembed.commands.data import FORMATS
from nvembed.core.steps import load_artifact
from nvembed.data.config import BeirSource, FilesSource, PrepareConfig
from nvembed.data.prepare import PREPARE
from nvembed.data.tables import read_corpus, read_examples
from nvembed.types import Artifact

SPLITS = ("train", "dev", "test")


def run(*arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output, everything."""
    done = CliRunner().invoke(app, ["data", "convert", *map(str, arguments)], env={"COLUMNS": "200"})
    return done.exit_code, done.stdout, done.output


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run: a prepare artifact with a retrieval set, classes and graded pairs."""
    folder = tmp_path_factory.mktemp("convert")
    rows = {
        "pairs": [
            {"anchor": f"question {i} {i**5}", "positive": f"answer {i} {i**7}", "negative": f"no {i} {i**6}"}
            for i in range(60)
        ],
        "classes": [{"text": f"{'sea' if i % 2 else 'bread'} {i} {i**5}", "label": f"c{i % 2}"} for i in range(60)],
        "graded": [
            {"sentence1": f"one {i} {i**5}", "sentence2": f"two {i} {i**7}", "score": i % 5 / 4} for i in range(60)
        ],
    }
    tasks = {"pairs": "retrieval", "classes": "classification", "graded": "sts"}
    sources = []
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        uris = (str(folder / f"{name}.jsonl"),)
        sources.append(FilesSource(name=name, instruction="web_search", uris=uris, task=tasks[name]))  # type: ignore[arg-type]
    PREPARE.run(PrepareConfig(sources=tuple(sources)), {}, str(folder / "run/prepare"))
    return folder / "run"


def examples(artifact: Artifact, split: str, name: str = "pairs") -> set[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Examples as texts: ids are made new when a data set is read again."""
    table = read_corpus(artifact, name)
    text = dict(zip(table.column("id").to_pylist(), table.column("text").to_pylist(), strict=True))
    return {
        (row.query, tuple(text[item.id] for item in row.positives), tuple(text[item.id] for item in row.negatives))
        for row in read_examples(artifact, name, split)
    }


def test_a_beir_folder_has_every_split(output: Path, tmp_path: Path) -> None:
    code, shown, everything = run(output, "--dataset", "pairs", "--to", "beir", "--out", tmp_path / "beir", "--json")
    assert code == 0, everything
    answer = json.loads(shown)
    source = BeirSource(name="pairs", instruction="web_search", uri=str(tmp_path / "beir"))
    again = PREPARE.run(PrepareConfig(sources=(source,)), {}, str(tmp_path / "again"))
    artifact = load_artifact(str(output / "prepare"))
    for split in SPLITS:
        before, after = examples(artifact, split), examples(again, split)
        assert {row[:2] for row in after} == {row[:2] for row in before} and answer["examples"][split] == len(before)
    assert answer["dataset"] == "pairs" and answer["format"] == "beir" and answer["out"] == str(tmp_path / "beir")


def texts(form: str, row: dict[str, Any]) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Query, positives and negatives of a row of a format."""
    if form == "sentence-transformers":
        return row["anchor"], (row["positive"],), (row["negative_1"],)
    if form == "flag-embedding":
        return row["query"], tuple(row["pos"]), tuple(row["neg"])
    documents = (tuple(item["text"] for item in row[f"{name}_passages"]) for name in ("positive", "negative"))
    return (row["query"], *documents)


@pytest.mark.parametrize("form", ["sentence-transformers", "flag-embedding", "tevatron"])
def test_rows_have_the_texts_of_the_examples(output: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "rows.jsonl"
    code, shown, everything = run(output / "prepare", "--dataset", "pairs", "--to", form, "--out", out)
    artifact = load_artifact(str(output / "prepare"))
    expected = examples(artifact, "train")
    assert code == 0 and shown == f"{out}: pairs, {len(expected)} train examples\n", everything
    assert {texts(form, json.loads(line)) for line in out.read_text().splitlines()} == expected


def test_classes_and_graded_pairs_of_one_split(output: Path, tmp_path: Path) -> None:
    for name, form, columns in [
        ("classes", "labelled", {"text", "label"}), ("graded", "graded", {"sentence1", "sentence2", "score"})
    ]:  # fmt: skip
        out = tmp_path / f"{form}.jsonl"
        code, _, everything = run(output, "--dataset", name, "--split", "test", "--to", form, "--out", out)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert code == 0 and rows and all(set(row) == columns for row in rows), everything


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "beir"], "which data set? Give --dataset with one of: pairs, classes, graded"),
        (["--to", "xml", "--dataset", "pairs"], f"choose one of {', '.join(FORMATS)}"),
        (["--to", "beir", "--dataset", "none"], "it holds pairs, classes, graded"),
        (["--to", "beir", "--dataset", "graded"], "sts examples cannot be written in this format"),
        (["--to", "tevatron", "--dataset", "pairs", "--split", "all"], "choose one of train, dev, test"),
    ],
)
def test_wrong_calls_write_nothing(output: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, shown, everything = run(output, *arguments, "--out", tmp_path / "new.jsonl")
    assert code == 2 and message in everything and not shown and list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_and_only_prepared_data_is_converted(output: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("mine")
    options = ["--dataset", "pairs", "--to", "tevatron", "--out"]
    code, _, everything = run(output, *options, tmp_path / "rows.jsonl")
    assert (
        code == 2 and "exists. Choose another --out" in everything and (tmp_path / "rows.jsonl").read_text() == "mine"
    )
    code, _, everything = run(tmp_path, *options, tmp_path / "new.jsonl")
    assert code == 2 and "not a published artifact" in everything
