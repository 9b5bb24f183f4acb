"""Selection over whole arrays decides what the selection query by query decides, counts it alike, refuses alike."""

import importlib.util
from collections import Counter
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.data.tables import SCORED_IDS
from nvembed.mining import audit as audit_module
from nvembed.mining import blocks
from nvembed.mining.audit import Audit
from nvembed.mining.config import (
    MineConfig,
    RankWindow,
    SampledTopK,
    TopK,
    TopKAbs,
    TopKMarginPos,
    TopKPercPos,
    TopKShifted,
)
from nvembed.mining.layout import QUERY_SCHEMA
from nvembed.mining.rules import ceilings
from nvembed.mining.search import MinePaths, Searcher
from nvembed.mining.searched import PART_SCHEMA, SEARCHED_SCHEMA, NeedsSearchError
from nvembed.mining.worker import selected
from nvembed.retrieval.config import ExactIndex, FaissFlat, SearchConfig

spec = importlib.util.spec_from_file_location("query_by_query", Path(__file__).with_name("query_by_query.py"))
query_by_query = importlib.util.module_from_spec(spec)
spec.loader.exec_module(query_by_query)

CEILINGS = st.one_of(
    st.builds(TopKAbs, max_score=st.sampled_from([-0.5, 0.0, 0.25, 0.5])),
    st.builds(TopKMarginPos, margin=st.sampled_from([0.0, 0.1, 0.3])),
    st.builds(TopKPercPos, max_negative_to_positive_ratio=st.sampled_from([0.5, 0.8, 1.0])),
)
RULES = st.one_of(
    st.just(TopK()),
    st.builds(TopKShifted, shift=st.integers(0, 4)),
    CEILINGS,
    st.integers(1, 6).flatmap(lambda at: st.builds(RankWindow, first=st.just(at), last=st.integers(at, at + 3))),
    st.builds(SampledTopK, top=st.integers(1, 5), temperature=st.sampled_from([None, 0.05]), ceiling=CEILINGS),
)
SCHEMA = pa.schema([*SEARCHED_SCHEMA, *(field for field in PART_SCHEMA if field.name.endswith("_hashes"))])


def one_query(random, number, searched, depth, hashes):
    """A query as laid out and as searched: any ranking of a small corpus, with ties."""
    ids = sorted(hashes)
    items = sorted(({"id": key, "score": random.randint(-10, 10) / 10} for key in ids), key=by_score)
    positives = [random.choice(ids[-4:]) for _ in range(random.choice([1, 1, 2, 3]))]
    never = sorted({*positives, *random.choices([*ids, "held out", "gone"], k=random.choice([0, 0, 1, 3]))})
    if random.random() < 0.1:  # layout writes them sorted; nothing depends on it
        random.shuffle(never)
    found = {item["id"]: item["score"] for item in items if item["id"] in positives}
    ceiling = float(ceilings(searched, np.array([min(found.values())]))[0])
    below = [item for item in items if item["score"] < ceiling] if np.isfinite(ceiling) else []
    query = {
        "key": f"q{number}",
        "text": "",
        "instruction": "",
        "hash": random.randint(0, 40),
        "positives": positives,
        "own": random.randint(1, len(positives)),
        "never": never,
        "given": random.choices([*ids, "gone"], k=random.choice([0, 0, 1, 4])),
    }
    lists = {"plain": items[:depth], "under": below[:depth]}
    row = {
        "example_id": query["key"],
        "positives": [{"id": key, "score": found[key]} for key in dict.fromkeys(positives)],
        "ceiling": ceiling,
        "above": len(items) - len(below) if np.isfinite(ceiling) else 0,
        **lists,
        **{f"{name}_hashes": [hashes[item["id"]] for item in found] for name, found in lists.items()},
        "never_hashes": [hashes[key] for key in never if key in hashes],
    }
    return query, row


def by_score(item):
    return -item["score"], item["id"]


@st.composite
def groups(draw):
    """(config, way, queries, lanes)."""
    rule, wanted = draw(RULES), draw(st.integers(1, 4))
    needed = {"topk_shifted": "shift", "rank_window": "last", "sampled_topk": "top"}.get(rule.type)
    needed = getattr(rule, needed) + wanted * (rule.type == "topk_shifted") if needed else 1
    depth = needed + draw(st.integers(0, 4))  # short lists: much lies behind them, or in the gap
    config = MineConfig(
        rule=rule,
        depth=depth,
        num_negatives=wanted,
        max_per_document=None if isinstance(rule, SampledTopK) else draw(st.sampled_from([None, None, 2])),
        max_positive_rank=draw(st.sampled_from([None, None, 1])),
        seed=draw(st.integers(0, 3)),
        search=SearchConfig(index=draw(st.sampled_from([ExactIndex(), ExactIndex(), FaissFlat()]))),
    )
    searched = rule if draw(st.booleans()) else draw(CEILINGS)
    count, texts = draw(st.integers(1, 30)), draw(st.sampled_from([5, 40, 1000]))
    random = Random(draw(st.integers(0, 2**32)))
    hashes = {f"d{number:02d}": random.randint(0, texts) for number in range(count)}
    pairs = [one_query(random, number, searched, depth, hashes) for number in range(draw(st.integers(1, 12)))]
    queries = pa.Table.from_pylist([query for query, _ in pairs], schema=QUERY_SCHEMA)
    # Deepening reads vectors: `test_worker.py`. An approximate index takes what there is.
    way = "search" if isinstance(config.search.index, FaissFlat) else "reuse"
    return config, way, queries, [pa.Table.from_pylist([row for _, row in pairs], schema=SCHEMA)]


def outcome(select, *arguments):
    try:
        return select(*arguments)
    except NeedsSearchError as error:
        return str(error)


def check(group, block):
    config, way, queries, lanes = group
    searcher = Searcher(config, MinePaths.under("nowhere"))
    task = {"way": way, "dataset": "set"}
    expected = outcome(query_by_query.selected, searcher, task, queries, lanes)
    with mock.patch.object(blocks, "BLOCK", block):
        found = outcome(selected, searcher, task, queries, lanes)
    if isinstance(expected, str):
        assert found == expected
        return
    assert found[0].to_pylist() == expected[0]
    dumped = found[1].dump()
    for name in dumped:
        if name != "histograms":
            dumped[name] = {key: value for key, value in dumped[name].items() if value}
    assert dumped == expected[1]


@given(groups(), st.sampled_from([1, 2, 1024]))
@settings(max_examples=120, deadline=None)
def test_whole_arrays_decide_what_single_queries_decide(group, block):
    check(group, block)


@pytest.mark.slow
@given(groups(), st.sampled_from([1, 2, 1024]))
@settings(max_examples=3000, deadline=None)
def test_whole_arrays_decide_what_single_queries_decide_in_many_cases(group, block):
    check(group, block)


@given(st.lists(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=5), max_size=6), max_size=5), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_hubs_are_counted_over_tables(tables, together):
    audit, counter = Audit(), Counter()
    with mock.patch.object(audit_module, "_HUB_ROWS", together), mock.patch.object(audit_module, "HUBS", 3):
        for rows in tables:
            lists = [[{"id": key, "score": None} for key in keys] for keys in rows]
            audit.add_hubs(pa.chunked_array([pa.array(lists, SCORED_IDS)]))
            counter.update(key for keys in rows for key in keys)
        found = audit.hub_summary()
    largest = sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:3]
    assert found["largest"] == [{"id": key, "queries": count} for key, count in largest]
    assert found["documents"] == len(counter)
    assert found["share_of_top_percent"] == (largest[0][1] / counter.total() if counter else 0.0)
