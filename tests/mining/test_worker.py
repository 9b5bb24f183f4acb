"""The mining worker in one process, on made-up vectors: equal to a naive "filter the whole ranking, take the top";
random negatives of a group are those that each example draws alone from the whole corpus."""

import numpy as np
import oracle
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.core.parquet import list_shards, read_table
from nvembed.core.storage import join, read_json
from nvembed.core.vectors import vector_table, write_shard
from nvembed.mining.config import MineConfig, RandomNegatives
from nvembed.mining.layout import DOCUMENT_SCHEMA, QUERY_SCHEMA, MinePaths, RandomTask, SearchTask, task_to_json
from nvembed.mining.rules import draw_accepted, example_generator
from nvembed.mining.search import Searcher
from nvembed.mining.worker import MineWorker, random_lists, select_negatives
from nvembed.retrieval.config import SearchConfig
from nvembed.retrieval.exact.topk import pair_scores
from nvembed.types import UserError

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


def write_world(paths, world, shard_rows):
    ids, hashes, document_ND, rows, query_QD = world
    names = {"documents": [], "queries": []}
    for start in range(0, DOCUMENTS, shard_rows):
        part = slice(start, start + shard_rows)
        name = f"part-{start:05d}.parquet"
        texts = [
            {"key": key, "text": key, "instruction": "", "hash": digest}
            for key, digest in zip(ids[part], hashes[part], strict=True)
        ]
        write_shard(pa.Table.from_pylist(texts, schema=DOCUMENT_SCHEMA), join(paths.texts, "set/documents", name))
        write_shard(vector_table(pa.array(ids[part]), document_ND[part]), join(paths.vectors, "set/documents", name))
        names["documents"].append(name)
    for start in range(0, QUERIES, 10):
        part = slice(start, start + 10)
        name = f"part-{start:05d}.parquet"
        write_shard(pa.Table.from_pylist(rows[part], schema=QUERY_SCHEMA), join(paths.texts, "set/queries", name))
        keys = pa.array([row["key"] for row in rows[part]])
        write_shard(vector_table(keys, query_QD[part]), join(paths.vectors, "set/queries", name))
        names["queries"].append(name)
    return names["queries"]


def mine(tmp_path, world, config, shard_rows=17):
    """Mined rows and the numbers of the part: three parts of the corpus, or a draw."""
    paths = MinePaths.under(str(tmp_path))
    shards = tuple(write_world(paths, world, shard_rows))
    names, common = list_shards(join(paths.texts, "set/documents")), ("set", "part-00000", QUERIES, shards)
    if isinstance(config.rule, RandomNegatives):
        tasks = [RandomTask(*common, DOCUMENTS)]
    else:
        parts = [tuple(names[part::3]) for part in range(min(3, len(names)))]
        tasks = [SearchTask(*common, number, len(parts), part, DOCUMENTS) for number, part in enumerate(parts)]
    for task in tasks:
        counters = MineWorker(config, paths).work(task_to_json(task))
    assert counters["rows"] == QUERIES
    part = join(paths.select, "set", "part-00000")
    return read_table(f"{part}.parquet").to_pylist(), read_json(f"{part}.json")


def naive(world, share, count):
    ids, hashes, document_ND, rows, query_QD = world
    result = []
    for row, query in zip(rows, query_QD, strict=True):
        scores = document_ND.astype(np.float64) @ query.astype(np.float64)
        lowest = min(scores[ids.index(key)] for key in row["positives"])
        never = {row["hash"], *(hashes[ids.index(key)] for key in row["never"])}
        chosen = []
        for index in sorted(range(DOCUMENTS), key=lambda index: (-scores[index], ids[index])):
            free = ids[index] not in row["never"] and hashes[index] not in never
            if free and scores[index] < lowest - (1 - share) * abs(lowest) and len(chosen) < count:
                chosen.append((ids[index], scores[index]))
                never.add(hashes[index])
        result.append(chosen)
    return result


@pytest.mark.parametrize(("depth", "share"), [(90, 0.95), (5, 0.95), (5, 0.7)])
def test_negatives_equal_filtering_the_whole_ranking(tmp_path, world, depth, share):
    config = MineConfig(
        depth=depth, num_negatives=4, rule={"type": "topk_perc_pos", "max_negative_to_positive_ratio": share}
    )
    mined_rows, audit = mine(tmp_path, world, config)
    rows = world[3]
    for row, mined, expected in zip(rows, mined_rows, naive(world, share, 4), strict=True):
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
    assert audit["counts"]["negatives"] == sum(len(row["negatives"]) for row in mined_rows)
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
def test_deepened_search_equals_the_whole_ranking(tmp_path, world, changes):
    rows = world[3]
    config = MineConfig.model_validate({"depth": 5, "num_negatives": 4, **changes})
    mine(tmp_path, world, config)
    searcher = Searcher(config, MinePaths.under(str(tmp_path)))
    names = tuple(list_shards(join(str(tmp_path), "checkpoints/texts/set/queries")))
    task = SearchTask("set", "part-00000", QUERIES, names, None, 3, (), DOCUMENTS)
    queries = searcher.queries(task)
    tables = [searcher.searched(task, queries, 0)]
    mined, audit = select_negatives(searcher, task, queries, tables)
    whole = [whole_ranking(world, number) for number in range(QUERIES)]
    expected, _ = oracle.mine(config.model_dump(), rows, [whole], strict=True)
    if config.max_per_document is None:
        assert negatives(mined.to_pylist()) == negatives(expected)
    for short, whole_list in zip(negatives(mined.to_pylist()), negatives(expected), strict=True):
        assert short == whole_list[: len(short)] and len(short) >= min(4, len(whole_list))  # with a cap: a choice
    _, numbers = oracle.mine(config.model_dump(), rows, [tables[0].to_pylist()], strict=False)
    assert audit.dump()["rejected"] == numbers["rejected"]
    assert audit.counts["deepened"] > 0


def negatives(rows):
    return [[(item["id"], item["score"]) for item in row["negatives"]] for row in rows]


def whole_ranking(world, number):
    """A query's search result with all documents in it."""
    ids, hashes, document_ND, rows, query_QD = world
    query = np.repeat(query_QD[number][None], DOCUMENTS, axis=0)
    scores = dict(zip(ids, pair_scores(query, document_ND).tolist(), strict=True))
    order = sorted(ids, key=lambda key: (-scores[key], key))
    by_id = dict(zip(ids, hashes, strict=True))
    return {
        "positives": [{"id": key, "score": scores[key]} for key in rows[number]["positives"]],
        "ceiling": float("inf"),
        "above": 0,
        "plain": [{"id": key, "score": scores[key]} for key in order],
        "under": [],
        "plain_hashes": [by_id[key] for key in order],
        "under_hashes": [],
        "never_hashes": [by_id[key] for key in rows[number]["never"]],
        "depth": DOCUMENTS + 1,
    }


def test_division_changes_no_byte(tmp_path, world):
    config = MineConfig(depth=5, num_negatives=3)
    first = mine(tmp_path / "one", world, config, shard_rows=90)
    small = config.model_copy(update={"search": SearchConfig(block_documents=4)})
    assert mine(tmp_path / "two", world, small, shard_rows=7) == first


def test_selection_needs_nothing_of_the_corpus(tmp_path, world):
    """A part of the search has the text hashes."""
    config = MineConfig(depth=DOCUMENTS, num_negatives=4)
    first = mine(tmp_path, world, config)
    selected = list((tmp_path / "checkpoints/select/set").iterdir())
    before = {path: path.read_bytes() for path in selected}
    for path in (*selected, *tmp_path.glob("checkpoints/*/set/documents/*")):
        path.unlink()
    shards = tuple(list_shards(join(str(tmp_path), "checkpoints/texts/set/queries")))
    task = SearchTask("set", "part-00000", QUERIES, shards, None, 3, (), DOCUMENTS)
    MineWorker(config, MinePaths.under(str(tmp_path))).work(task_to_json(task))
    assert {path: path.read_bytes() for path in selected} == before
    assert first[1]["counts"]["mined"] == QUERIES


def test_random_rule_draws_other_documents_and_knows_the_positives(tmp_path, world):
    config = MineConfig(rule=RandomNegatives(), num_negatives=6, seed=1)
    mined_rows, audit = mine(tmp_path / "one", world, config)
    ids, hashes, _, rows, _ = world
    for row, mined in zip(rows, mined_rows, strict=True):
        keys = [item["id"] for item in mined["negatives"]]
        drawn = {hashes[ids.index(key)] for key in keys}
        assert len(drawn) == len(keys) == 6
        assert not drawn & {row["hash"], *(hashes[ids.index(key)] for key in row["never"])}
    assert len({item["id"] for mined in mined_rows for item in mined["negatives"]}) > 60
    assert sum(audit["rejected"].values()) == 0
    other = config.model_copy(update={"seed": 2})
    assert mine(tmp_path / "two", world, other)[0] != mined_rows
    assert mine(tmp_path / "three", world, config, shard_rows=5)[0] == mined_rows


def test_a_positive_that_is_not_in_the_corpus_is_named(tmp_path, world):
    ids, hashes, document_ND, rows, query_QD = world
    broken = [{**rows[0], "positives": ["gone"]}, *rows[1:]]
    with pytest.raises(UserError, match="'q00' names 'gone'"):
        mine(tmp_path, (ids, hashes, document_ND, broken, query_QD), MineConfig(depth=5))


# -- random draws of a group -------------------------------------------------------------------------------------------


def alone(config, row, documents):
    """One example's draws in plain Python, from all documents in the order of their ids."""
    ids, by_id = sorted(documents), documents
    never = {row["hash"], *(by_id[key] for key in row["never"] if key in by_id)}

    def accept(order):
        chosen, used = [], set(never)
        for place in order:
            if by_id[ids[place]] not in used and len(chosen) < config.num_negatives:
                chosen.append(place)
                used.add(by_id[ids[place]])
        return chosen

    drawn = draw_accepted(example_generator(config.seed, "set", row["key"]), len(ids), config.num_negatives, accept)
    return [ids[place] for place in drawn]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("draws")


@given(
    hashes=st.lists(st.integers(0, 30), max_size=120),
    never=st.lists(st.lists(st.integers(0, 130), max_size=4), min_size=1, max_size=6),
    wanted=st.integers(1, 9),
    seed=st.integers(0, 3),
    at_once=st.sampled_from([1, 7, 1000]),
)
@settings(deadline=None)
def test_a_group_draws_what_each_example_draws_alone(folder, hashes, never, wanted, seed, at_once):
    documents = {f"d{number:03}": digest for number, digest in enumerate(hashes)}
    config = MineConfig(rule=RandomNegatives(), num_negatives=wanted, seed=seed)
    searcher = Searcher(config, MinePaths.under(str(folder)), hashes_at_once=at_once)
    texts = folder / "checkpoints/texts/set/documents"
    for old in texts.glob("part-*"):
        old.unlink()
    ids = sorted(documents)
    for number, start in enumerate(range(0, len(ids), 11)):
        keys = ids[start : start + 11]
        table = pa.table({"key": keys, "hash": pa.array([documents[key] for key in keys], pa.int64())})
        write_shard(table, str(texts / f"part-{number:05}.parquet"))
    rows = [
        {"key": f"q{number}", "hash": number, "never": [f"d{place:03}" for place in places]}
        for number, places in enumerate(never)
    ]
    queries = pa.Table.from_pylist(rows, schema=pa.schema([(name, QUERY_SCHEMA.field(name).type) for name in rows[0]]))
    lists = random_lists(searcher, RandomTask("set", "part-00000", len(rows), (), len(ids)), queries)
    drawn = [[item["id"] for item in items] for items in lists.to_pylist()]
    assert drawn == [alone(config, row, documents) for row in rows]
