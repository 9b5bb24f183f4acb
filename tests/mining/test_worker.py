"""The mining worker in one process, on made-up vectors: equal to a naive "filter the whole ranking, take the top"."""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from nvembed.core.storage import join, read_json
from nvembed.core.vectors import list_shards, read_table, vector_table, write_table
from nvembed.mining.config import MineConfig, RandomNegatives
from nvembed.mining.layout import DOCUMENT_SCHEMA, QUERY_SCHEMA
from nvembed.mining.worker import MinePaths, MineWorker, selected
from nvembed.retrieval.config import SearchConfig
from nvembed.types import UserError

spec = importlib.util.spec_from_file_location("query_by_query", Path(__file__).with_name("query_by_query.py"))
query_by_query = importlib.util.module_from_spec(spec)
spec.loader.exec_module(query_by_query)

DOCUMENTS, QUERIES, DIM = 90, 25, 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Documents 80-89 repeat the texts (and vectors) of 0-9; query 0 has two positives, one of them hard to find."""
    generator = np.random.default_rng(5)
    document_ND = generator.standard_normal((DOCUMENTS, DIM)).astype(np.float32)
    document_ND /= np.linalg.norm(document_ND, axis=1, keepdims=True)
    document_ND[80:] = document_ND[:10]
    hashes = [*range(80), *range(10)]
    ids = [f"d{index:02d}" for index in range(DOCUMENTS)]
    query_QD = generator.standard_normal((QUERIES, DIM)).astype(np.float32)
    query_QD[:10] = document_ND[:10] + 0.3 * generator.standard_normal((10, DIM)).astype(np.float32)
    query_QD /= np.linalg.norm(query_QD, axis=1, keepdims=True)
    rows = [
        {
            "key": f"q{index:02d}",
            "text": f"query {index}",
            "instruction": "",
            "hash": 1000 + index if index != 3 else 7,  # query 3 is the very text of document 7
            "positives": [ids[index]] + ([ids[40]] if index == 0 else []),
            "own": 1,
            "never": [ids[index]] + ([ids[40]] if index == 0 else []),
            "given": [ids[60], ids[index]] if index == 4 else [],
        }
        for index in range(QUERIES)
    ]
    return ids, hashes, document_ND, rows, query_QD


def lay(paths, world, shard_rows):
    ids, hashes, document_ND, rows, query_QD = world
    names = {"documents": [], "queries": []}
    for start in range(0, DOCUMENTS, shard_rows):
        part = slice(start, start + shard_rows)
        name = f"part-{start:05d}.parquet"
        texts = [
            {"key": key, "text": key, "instruction": "", "hash": digest}
            for key, digest in zip(ids[part], hashes[part], strict=True)
        ]
        write_table(pa.Table.from_pylist(texts, schema=DOCUMENT_SCHEMA), join(paths.texts, "set/documents", name))
        write_table(vector_table(pa.array(ids[part]), document_ND[part]), join(paths.vectors, "set/documents", name))
        names["documents"].append(name)
    for start in range(0, QUERIES, 10):
        part = slice(start, start + 10)
        name = f"part-{start:05d}.parquet"
        write_table(pa.Table.from_pylist(rows[part], schema=QUERY_SCHEMA), join(paths.texts, "set/queries", name))
        keys = pa.array([row["key"] for row in rows[part]])
        write_table(vector_table(keys, query_QD[part]), join(paths.vectors, "set/queries", name))
        names["queries"].append(name)
    return names["queries"]


def mine(tmp_path, world, config, way="search", shard_rows=17):
    paths = MinePaths.under(str(tmp_path))
    shards = lay(paths, world, shard_rows)
    task = {"way": way, "dataset": "set", "shards": shards, "rows": QUERIES, "part": "part-00000"}
    names = list_shards(join(paths.texts, "set/documents"))
    segments = [names[part::3] for part in range(min(3, len(names)))] if way == "search" else [names]
    for number, documents in enumerate(segments):
        found = MineWorker(config, paths).work(
            {**task, "segment": number, "segments": len(segments), "documents": documents, "corpus": DOCUMENTS}
        )
    assert found["rows"] == QUERIES
    part = join(paths.select, "set", "part-00000")
    return read_table(f"{part}.parquet").to_pylist(), read_json(f"{part}.json")


def naive(world, share, count):
    ids, hashes, document_ND, rows, query_QD = world
    result = []
    for row, query in zip(rows, query_QD, strict=True):
        scores = document_ND.astype(np.float64) @ query.astype(np.float64)
        lowest = min(scores[ids.index(key)] for key in row["positives"])
        never = {row["hash"], *(hashes[ids.index(key)] for key in row["never"])}
        kept = []
        for index in sorted(range(DOCUMENTS), key=lambda index: (-scores[index], ids[index])):
            free = ids[index] not in row["never"] and hashes[index] not in never
            if free and scores[index] < lowest - (1 - share) * abs(lowest) and len(kept) < count:
                kept.append((ids[index], scores[index]))
                never.add(hashes[index])
        result.append(kept)
    return result


@pytest.mark.parametrize(("depth", "share"), [(90, 0.95), (5, 0.95), (5, 0.7)])
def test_negatives_equal_filtering_the_whole_ranking(tmp_path, world, depth, share):
    config = MineConfig(
        depth=depth, num_negatives=4, rule={"type": "topk_perc_pos", "max_negative_to_positive_ratio": share}
    )
    found, audit = mine(tmp_path, world, config)
    rows = world[3]
    for row, mined, expected in zip(rows, found, naive(world, share, 4), strict=True):
        assert mined["example_id"] == row["key"]
        assert mined["known_positives"] == sorted(row["never"])
        assert [item["id"] for item in mined["positives"]] == row["positives"][:1]
        negatives = mined["negatives"]
        if row["given"]:
            assert negatives[0] == {"id": "d60", "score": None}  # given first; the given positive is refused
            expected = [pair for pair in expected if pair[0] != "d60"][:3]
            negatives = negatives[1:]
        assert [item["id"] for item in negatives] == [key for key, _ in expected]
        np.testing.assert_allclose([item["score"] for item in negatives], [score for _, score in expected], atol=1e-12)
    assert audit["counts"]["mined"] == QUERIES
    assert audit["counts"]["negatives"] == sum(len(row["negatives"]) for row in found)
    assert sum(audit["histograms"]["positives"]) == QUERIES == sum(audit["positive_ranks"].values())
    assert audit["rejected"]["too_close_to_positive"] > 0
    assert (audit["counts"]["deepened"] > 10) == (depth == 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": {"type": "topk_margin_pos", "margin": 0.4}},
        {"rule": {"type": "sampled_topk", "top": 5, "ceiling": {"type": "topk_abs", "max_score": 0.1}}},
        {"rule": {"type": "topk_abs", "max_score": 0.2}, "max_per_document": 2},
    ],
)
def test_deepened_like_the_selection_query_by_query(tmp_path, world, changes):
    config = MineConfig.model_validate({"depth": 5, "num_negatives": 4, **changes})
    mine(tmp_path, world, config)
    worker = MineWorker(config, MinePaths.under(str(tmp_path)))
    names = list_shards(join(str(tmp_path), "checkpoints/texts/set/queries"))
    task = {
        "way": "search",
        "dataset": "set",
        "shards": names,
        "part": "part-00000",
        "segments": 3,
        "corpus": DOCUMENTS,
    }
    rows = worker._searcher.queries(task)
    lanes = [worker._searched(task, rows, 0)]
    found, audit = selected(worker._searcher, task, rows, lanes)
    expected, numbers = query_by_query.selected(worker._searcher, task, rows, lanes)
    assert found.to_pylist() == expected
    assert audit.dump()["rejected"] == numbers["rejected"]
    assert audit.counts["deepened"] > 0


def test_division_changes_no_byte(tmp_path, world):
    config = MineConfig(depth=5, num_negatives=3)
    first = mine(tmp_path / "one", world, config, shard_rows=90)
    small = config.model_copy(update={"search": SearchConfig(block_documents=4)})
    assert mine(tmp_path / "two", world, small, shard_rows=7) == first


def test_selection_needs_nothing_of_the_corpus(tmp_path, world):
    """A part of the search brings the text hashes along; one that an older nvembed left without them is not read."""
    config = MineConfig(depth=DOCUMENTS, num_negatives=4)
    stale = tmp_path / "checkpoints/search/set/part-00000/lane-0-part-00000.parquet"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"no hashes")
    first = mine(tmp_path, world, config)
    selected = list((tmp_path / "checkpoints/select/set").iterdir())
    before = {path: path.read_bytes() for path in selected}
    for path in (*selected, *tmp_path.glob("checkpoints/*/set/documents/*")):
        path.unlink()
    shards = list_shards(join(str(tmp_path), "checkpoints/texts/set/queries"))
    task = {"way": "search", "dataset": "set", "shards": shards, "rows": QUERIES, "part": "part-00000"}
    MineWorker(config, MinePaths.under(str(tmp_path))).work({**task, "segment": None, "segments": 3, "documents": []})
    assert {path: path.read_bytes() for path in selected} == before
    assert first[1]["counts"]["mined"] == QUERIES


def test_random_rule_draws_other_documents_and_knows_the_positives(tmp_path, world):
    config = MineConfig(rule=RandomNegatives(), num_negatives=6, seed=1)
    found, audit = mine(tmp_path / "one", world, config, way="random")
    ids, hashes, _, rows, _ = world
    for row, mined in zip(rows, found, strict=True):
        keys = [item["id"] for item in mined["negatives"]]
        drawn = {hashes[ids.index(key)] for key in keys}
        assert len(drawn) == len(keys) == 6
        assert not drawn & {row["hash"], *(hashes[ids.index(key)] for key in row["never"])}
    assert len({item["id"] for mined in found for item in mined["negatives"]}) > 60
    assert sum(audit["rejected"].values()) == 0
    other = config.model_copy(update={"seed": 2})
    assert mine(tmp_path / "two", world, other, way="random")[0] != found
    assert mine(tmp_path / "three", world, config, way="random", shard_rows=5)[0] == found


def test_a_positive_that_is_not_in_the_corpus_is_named(tmp_path, world):
    ids, hashes, document_ND, rows, query_QD = world
    broken = [{**rows[0], "positives": ["gone"]}, *rows[1:]]
    with pytest.raises(UserError, match="'q00' names 'gone'"):
        mine(tmp_path, (ids, hashes, document_ND, broken, query_QD), MineConfig(depth=5))
