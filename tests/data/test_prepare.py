"""The prepare step on the real packages, and on bad input."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plain_shingles import shingles

from nvembed.core import storage
from nvembed.core.steps import MANIFEST, load_artifact
from nvembed.data.config import (
    CweSource,
    FilesSource,
    HpoClassesSource,
    HpoRetrievalSource,
    HpoSimilaritySource,
    NearDuplicateConfig,
    PrepareConfig,
    StdlibCodeSource,
)
from nvembed.data.prepare import PREPARE
from nvembed.data.tables import SPLITS, dataset_info, document_text, read_corpus, read_examples
from nvembed.text.identity import jaccard
from nvembed.types import Artifact, TaskType, UserError

CAPS = {"max_documents": 400, "max_train": 200, "max_test": 60}
CONFIG = PrepareConfig(
    sources=(
        CweSource(name="cwe", instruction="cwe", max_train=200, max_test=60),
        HpoRetrievalSource(name="hpo", instruction="hpo_retrieval", **CAPS),
        StdlibCodeSource(name="code", instruction="stdlib_code", **CAPS),
        HpoClassesSource(name="hpo_classes", instruction="hpo_classes", max_train=200, max_test=60),
        HpoSimilaritySource(name="hpo_similarity", instruction="hpo_similarity", max_train=200, max_test=60),
    ),
    seed=3,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return PREPARE.run(CONFIG, {}, str(tmp_path_factory.mktemp("prepare") / "prepare"))


def test_what_is_recorded(prepared: Artifact) -> None:
    info = dataset_info(prepared)
    assert list(info) == [source.name for source in CONFIG.sources]
    for name, row in info.items():
        assert row["instruction"].startswith("Instruct: ") and row["instruction"].endswith("\nQuery: ")
        assert len(row["split_rule"]) > 30 and row["licence"]
        assert row["synthetic"] == (name == "hpo_similarity")
        assert len(row["evaluation_hash"]) == 64
        for split in SPLITS:
            assert row[split] == len(read_examples(prepared, name, split)) > 0
        assert row["documents"] == read_corpus(prepared, name).num_rows
        assert row["train"] <= 200 and row["test"] == 60 and row["dev"] == 60
    assert info["cwe"]["documents"] == 938 and info["cwe"]["documents_shared"] > 0
    assert info["hpo"]["documents"] == info["code"]["documents"] == 400
    assert sum(row["documents_shared"] for row in info.values()) == info["cwe"]["documents_shared"]
    assert prepared.manifest["rows"]["train"] == sum(row["train"] for row in info.values())


@pytest.mark.parametrize("name", ["cwe", "hpo", "code", "hpo_classes", "hpo_similarity"])
def test_no_text_is_in_two_splits(prepared: Artifact, name: str) -> None:
    """Exact, by brute force: no training query or (where documents are apart) positive nearly copies a held-out one."""
    corpus = {row["id"]: document_text(row["title"], row["text"]) for row in read_corpus(prepared, name).to_pylist()}
    texts = {}
    for split in SPLITS:
        examples = read_examples(prepared, name, split)
        texts[split] = {row.query for row in examples}
        if name != "cwe":
            texts[split] |= {corpus[item.id] for row in examples for item in row.positives}
    assert not texts["train"] & (texts["dev"] | texts["test"])
    assert not texts["dev"] & texts["test"]
    near = NearDuplicateConfig()
    held_out = [shingles(text, near.shingle_words) for split in ("dev", "test") for text in texts[split]]
    train = [shingles(text, near.shingle_words) for text in texts["train"]]
    assert max(jaccard(a, b) for a in train for b in held_out) < near.threshold
    assert dataset_info(prepared)[name]["near_duplicates_left"] == 0


def test_items_of_symmetric_sets_are_in_the_corpus_with_their_split(prepared: Artifact) -> None:
    for name in ("hpo_classes", "hpo_similarity"):
        corpus = {row["id"]: row for row in read_corpus(prepared, name).to_pylist()}
        splits = {row["split"] for row in corpus.values()}
        assert splits == set(SPLITS)
        for split in SPLITS:
            for row in read_examples(prepared, name, split):
                own = row.id.split("~")[0]
                assert corpus[own]["text"] == row.query and corpus[own]["split"] == split
                assert all(corpus[item.id]["split"] == split for item in row.positives)
                assert (row.label == corpus[own]["label"]) and (row.label is None) == (row.task is TaskType.STS)


@pytest.mark.parametrize("name", ["cwe", "hpo", "code"])
def test_documents_of_held_out_queries_only_are_in_their_split(prepared: Artifact, name: str) -> None:
    corpus = {row["id"]: row["split"] for row in read_corpus(prepared, name).to_pylist()}
    answers = {
        split: {item.id for row in read_examples(prepared, name, split) for item in row.positives} for split in SPLITS
    }
    held_out = (answers["dev"] | answers["test"]) - answers["train"]
    assert held_out and answers["train"]
    assert all(corpus[key] in ("dev", "test") for key in held_out)
    assert all(split is None for key, split in corpus.items() if key not in held_out)


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(prepared: Artifact, tmp_path: Path) -> None:
    """Another process hashes strings differently (PYTHONHASHSEED), so no order may come from a set."""
    script = (
        "import sys; from nvembed.data.config import PrepareConfig; from nvembed.data.prepare import PREPARE; "
        "PREPARE.run(PrepareConfig.model_validate_json(sys.argv[1]), {}, sys.argv[2])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    out = str(tmp_path / "again")
    subprocess.run(
        [sys.executable, "-c", script, CONFIG.model_dump_json(), out], check=True, env=environment, timeout=250
    )
    again = load_artifact(out)
    assert again.manifest["files"] == prepared.manifest["files"]
    assert again.manifest_hash == prepared.manifest_hash
    assert again.manifest["metrics"] == prepared.manifest["metrics"]


def test_the_seed_chooses_the_sample_not_the_splits(prepared: Artifact, tmp_path: Path) -> None:
    config = PrepareConfig(sources=CONFIG.sources[:1], seed=4)
    other = PREPARE.run(config, {}, str(tmp_path / "other"))
    first, second = ({row.id for row in read_examples(item, "cwe", "test")} for item in (prepared, other))
    assert first != second
    assert not second & {row.id for row in read_examples(prepared, "cwe", "train")}
    info = dataset_info(other)["cwe"]
    assert info["evaluation_hash"] != dataset_info(prepared)["cwe"]["evaluation_hash"]


def test_counts_are_printed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nvembed.data.prepare"):
        PREPARE.run(PrepareConfig(sources=CONFIG.sources[:1]), {}, str(tmp_path / "out"))
    assert "near duplicates across the split: " in caplog.text and " dropped, 0 left" in caplog.text


# -- bad input --------------------------------------------------------------------------------------------------------


def rows_file(path: Path, good: int, bad: int) -> Path:
    lines = [json.dumps({"anchor": f"secret question {i}", "positive": f"secret answer {i}"}) for i in range(good)]
    path.write_text("\n".join([*lines[:5], *['{"anchor": "secret"}'] * bad, *lines[5:]]))
    return path


def files_config(path: Path, **options: object) -> PrepareConfig:
    source = FilesSource(name="mine", instruction="web_search", uris=(str(path),))
    return PrepareConfig(sources=(source,), **options)


def test_a_few_malformed_rows_are_listed_without_their_text(tmp_path: Path) -> None:
    config = files_config(rows_file(tmp_path / "rows.jsonl", 200, 4))
    artifact = PREPARE.run(config, {}, str(tmp_path / "out"))
    assert dataset_info(artifact)["mine"]["rejected"] == 4
    listed = storage.read_bytes(artifact.path("mine", "rejects.jsonl")).decode()
    rows = [json.loads(line) for line in listed.splitlines()]
    assert rows == [{"file": "rows.jsonl", "line": line, "reason": "positive missing"} for line in range(6, 10)]
    assert "secret" not in listed
    assert sum(dataset_info(artifact)["mine"][split] for split in SPLITS) == 200


def test_too_many_malformed_rows_publish_nothing(tmp_path: Path) -> None:
    config = files_config(rows_file(tmp_path / "rows.jsonl", 200, 150))
    out = str(tmp_path / "out")
    with pytest.raises(UserError) as raised:
        PREPARE.run(config, {}, out)
    message = str(raised.value)
    assert "150 of 350 rows" in message and "150 x positive missing" in message
    assert "rows.jsonl:6 positive missing" in message and "max_reject_share" in message and "secret" not in message
    assert not storage.exists(storage.join(out, MANIFEST))
    assert len(storage.read_bytes(storage.join(out, "mine", "rejects.jsonl")).splitlines()) == 100
    with pytest.raises(UserError, match="150 of 350"):
        PREPARE.run(config, {}, out)
    raised_share = PREPARE.run(files_config(tmp_path / "rows.jsonl", max_reject_share=0.5), {}, str(tmp_path / "more"))
    assert dataset_info(raised_share)["mine"]["rejected"] == 150


def test_a_file_of_nothing_but_malformed_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 of 3 rows are malformed"):
        PREPARE.run(files_config(rows_file(tmp_path / "rows.jsonl", 0, 3)), {}, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("names", "message"),
    [((), "is empty"), (("a", "a"), "used twice"), (("a/b",), "cannot name a folder"), (("..",), "cannot name")],
)
def test_bad_names(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    config = PrepareConfig(sources=tuple(CweSource(name=name, instruction="cwe") for name in names))
    with pytest.raises(UserError, match=message):
        PREPARE.run(config, {}, str(tmp_path / "out"))


def test_an_unknown_instruction_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = PrepareConfig(sources=(CweSource(name="cwe", instruction="cwee"),))
    started = time.perf_counter()
    with pytest.raises(UserError, match="cwe"):
        PREPARE.run(config, {}, str(tmp_path / "out"))
    assert time.perf_counter() - started < 0.4


def test_caps_that_leave_no_training_say_so(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "rows.jsonl", 300, 0)
    source = FilesSource(name="mine", instruction="web_search", uris=(str(path),), max_documents=10)
    with pytest.raises(UserError, match=r"no training example fits beside the \d+ held-out ones.*max_documents"):
        PREPARE.run(PrepareConfig(sources=(source,)), {}, str(tmp_path / "out"))


def test_readers_name_what_there_is(prepared: Artifact) -> None:
    with pytest.raises(UserError, match=r"'cve' is not in .* it holds cwe, hpo"):
        read_corpus(prepared, "cve")
    with pytest.raises(UserError, match="split 'validation'"):
        read_examples(prepared, "cwe", "validation")
