"""What a stored search decides: the same as the whole ranking, or a refusal that names what is missing; never else."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.mining.config import RankWindow, TopK, TopKAbs, TopKMarginPos, TopKPercPos, TopKShifted
from nvembed.mining.rules import ceilings, rule_limits
from nvembed.mining.searched import PART_SCHEMA, NeedsSearchError, found_table, merged, ranking
from nvembed.mining.selection import select_negatives
from nvembed.retrieval.exact.search import search_shards

RULES = st.one_of(
    st.just(TopK()),
    st.builds(TopKShifted, shift=st.integers(0, 10)),
    st.builds(TopKAbs, max_score=st.floats(-1, 1)),
    st.builds(TopKMarginPos, margin=st.floats(0, 0.5)),
    st.builds(TopKPercPos, max_negative_to_positive_ratio=st.floats(0.3, 1)),
    st.integers(1, 10).flatmap(lambda first: st.builds(RankWindow, first=st.just(first), last=st.integers(first, 15))),
)


def stored(scores, searched, positive, depth):
    """The row that a search of `scores` (descending) leaves."""
    ceiling = float(ceilings(searched, np.array([positive]))[0])
    items = [{"id": f"d{place:02d}", "score": score} for place, score in enumerate(scores)]
    below = [item for item in items if item["score"] < ceiling] if math.isfinite(ceiling) else []
    above = len(items) - len(below) if math.isfinite(ceiling) else 0
    return {"plain": items[:depth], "under": below[:depth], "above": above, "ceiling": ceiling}


def select(known, rule, positive, count):
    limits = rule_limits(rule, np.array([positive]))
    picked = select_negatives(
        known.ids,
        known.scores,
        list(range(len(known.ids))),
        below=float(limits.ceiling_Q[0]),
        never_ids={"d03"},
        never_hashes=set(),
        count=count,
        ranks=(limits.first, limits.last),
        rank_of=known.ranks,
    )
    decided = len(picked.kept) + len(picked.rejected)
    known.check(limits, float(limits.ceiling_Q[0]), len(picked.kept) >= count, decided, "example 'x'")
    return [known.ids[place] for place in picked.kept]


@given(
    st.lists(st.floats(-1, 1), max_size=30),
    RULES,
    RULES,
    st.floats(-1, 1),
    st.integers(1, 12),
    st.integers(1, 8),
)
@settings(max_examples=250)
def test_another_rule_gets_the_truth_or_a_refusal(values, searched, rule, positive, depth, count):
    scores = sorted(values, reverse=True)
    whole = ranking(stored(scores, TopK(), positive, 99), 99)
    truth = select(whole, rule, positive, count)
    row = stored(scores, searched, positive, depth)
    known = ranking(row, depth)
    assert [scores[rank - 1] for rank in known.ranks] == list(known.scores)
    try:
        assert select(known, rule, positive, count) == truth
    except NeedsSearchError:
        assert known.gap is not None or not known.whole  # something was not searched


def test_the_refusal_names_what_to_search():
    scores = [0.9 - 0.01 * place for place in range(60)]
    row = stored(scores, TopKAbs(max_score=0.5), 0.95, 10)
    known = ranking(row, 10)
    assert known.gap == (11, 41) and not known.whole
    assert select(known, TopKAbs(max_score=0.45), 0.95, 3) == ["d46", "d47", "d48"]
    with pytest.raises(NeedsSearchError, match=r"'x': the rule asks about ranks 11 to 41 .* depth 41"):
        select(known, TopKAbs(max_score=0.7), 0.95, 3)
    with pytest.raises(NeedsSearchError, match="behind 51"):
        select(known, TopKAbs(max_score=0.4), 0.95, 3)


def with_hashes(found, known):
    """A part as it is stored: with text hashes of the candidates, and of those of `known` that the part holds."""
    table = found_table(found)
    for name in ("plain", "under"):
        hashes = [[digest(item["id"]) for item in items] for items in table.column(name).to_pylist()]
        table = table.append_column(f"{name}_hashes", pa.array(hashes, pa.list_(pa.int64())))
    never = [[digest(key) for key in known]] * table.num_rows
    return table.append_column("never_hashes", pa.array(never, pa.list_(pa.int64()))).cast(PART_SCHEMA)


def digest(key):
    return int(key[1:]) * 7919


@pytest.mark.parametrize("depth", [1, 7, 50])
def test_parts_of_the_corpus_merge_into_what_one_search_finds(depth):
    generator = np.random.default_rng(0)
    documents = generator.integers(-2, 3, (120, 5)).astype(np.float32)  # many ties
    query = generator.integers(-2, 3, (6, 5)).astype(np.float32)
    ids = np.array([f"d{number:03d}" for number in generator.permutation(120)], dtype=object)
    ceiling_Q = np.array([3.0, 2, 1, 0, -1, np.inf])
    options = {"plain": depth, "under": depth, "ceiling_Q": ceiling_Q, "count_above": True}
    whole = with_hashes(search_shards(query, [(ids, documents)], **options), ["d001", "d002"])
    for parts in (1, 3, 8, 60):
        cut = np.array_split(generator.permutation(120), parts)
        tables = (
            with_hashes(
                search_shards(query, [(ids[part], documents[part])], **options), {"d001", "d002"} & set(ids[part])
            )
            for part in cut
        )
        found = merged(tables, depth)
        assert found.drop(["never_hashes"]).equals(whole.drop(["never_hashes"]))
        assert [sorted(row) for row in found.column("never_hashes").to_pylist()] == [[7919, 2 * 7919]] * 6
