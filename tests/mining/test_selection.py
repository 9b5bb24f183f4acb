"""The selection over arrays decides and counts what the plain oracle does, and refuses alike; what may never happen."""

import math
from random import Random

import numpy as np
import oracle
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from nvembed.mining.layout import QUERY_SCHEMA, MinePaths, ReuseTask, SearchTask
from nvembed.mining.lists import PART_SCHEMA, SEARCHED_SCHEMA
from nvembed.mining.rules import ceilings, rule_limits
from nvembed.mining.search import Searcher
from nvembed.mining.selection import (
    CODE,
    NEGATIVE,
    UNDECIDED,
    Block,
    NeedsSearchError,
    Rankings,
    Reason,
    decide,
    select,
)
from nvembed.mining.worker import select_negatives
from nvembed.retrieval.config import ExactIndex, FaissFlat, SearchConfig

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
SEARCH = SearchTask("set", "part-00000", 1, (), None, 1, (), 1)
REUSE = ReuseTask("set", "part-00000", 1, (), 0)


def by_score(item):
    return -item["score"], item["id"]


def search_result(random, query, searched, depth, hashes):
    """A query's row as a search to `depth` leaves it: any ranking of a small corpus, with ties."""
    items = sorted(({"id": key, "score": random.randint(-10, 10) / 10} for key in hashes), key=by_score)
    scores = {item["id"]: item["score"] for item in items if item["id"] in query["positives"]}
    ceiling = oracle.ceiling(searched.model_dump(), min(scores.values()))
    below = [item for item in items if item["score"] < ceiling] if math.isfinite(ceiling) else []
    lists = {"plain": items[:depth], "under": below[:depth]}
    return {
        "example_id": query["key"],
        "positives": [{"id": key, "score": scores[key]} for key in dict.fromkeys(query["positives"])],
        "ceiling": ceiling,
        "above": len(items) - len(below) if math.isfinite(ceiling) else 0,
        **lists,
        **{f"{name}_hashes": [hashes[item["id"]] for item in items] for name, items in lists.items()},
        "never_hashes": [hashes[key] for key in query["never"] if key in hashes],
    }


def one_query(random, number, hashes):
    """A query as in its shard."""
    ids = sorted(hashes)
    positives = [random.choice(ids[-4:]) for _ in range(random.choice([1, 1, 2, 3]))]
    never = sorted({*positives, *random.choices([*ids, "held out", "gone"], k=random.choice([0, 0, 1, 3]))})
    if random.random() < 0.1:  # shards have them sorted; nothing depends on it
        random.shuffle(never)
    return {
        "key": f"q{number}",
        "text": "",
        "instruction": "",
        "hash": random.randint(0, 40),
        "positives": positives,
        "own": random.randint(1, len(positives)),
        "never": never,
        "given": random.choices([*ids, "gone"], k=random.choice([0, 0, 1, 4])),
    }


def group(random, config, searched, queries, documents, texts, retrievers=1):
    """(config, queries, search results of each retriever), rows of a group over a small corpus."""
    hashes = {f"d{number:02d}": random.randint(0, texts) for number in range(documents)}
    rows = [one_query(random, number, hashes) for number in range(queries)]
    results = [[search_result(random, row, searched, config.depth, hashes) for row in rows] for _ in range(retrievers)]
    return config, rows, results


@st.composite
def groups(draw):
    rule, wanted = draw(RULES), draw(st.integers(1, 4))
    needed = {"topk_shifted": "shift", "rank_window": "last", "sampled_topk": "top"}.get(rule.type)
    needed = getattr(rule, needed) + wanted * (rule.type == "topk_shifted") if needed else 1
    config = MineConfig(
        rule=rule,
        depth=needed + draw(st.integers(0, 4)),  # short lists: much lies behind them, or in the gap
        num_negatives=wanted,
        max_per_document=None if isinstance(rule, SampledTopK) else draw(st.sampled_from([None, None, 2])),
        max_positive_rank=draw(st.sampled_from([None, None, 1])),
        seed=draw(st.integers(0, 3)),
        search=SearchConfig(index=draw(st.sampled_from([ExactIndex(), ExactIndex(), FaissFlat()]))),
    )
    searched = rule if draw(st.booleans()) else draw(CEILINGS)
    retrievers = 1 if isinstance(config.search.index, ExactIndex) else draw(st.integers(1, 3))
    random = Random(draw(st.integers(0, 2**32)))
    texts = draw(st.sampled_from([5, 40, 1000]))
    return group(random, config, searched, draw(st.integers(1, 12)), draw(st.integers(1, 30)), texts, retrievers)


def tables(rows, results):
    queries = pa.Table.from_pylist(rows, schema=QUERY_SCHEMA)
    return queries, [pa.Table.from_pylist(each, schema=SCHEMA) for each in results]


def check(config, rows, results):
    """Searching deeper reads vectors (`test_worker.py`); an earlier search is refused, an approximate index has all."""
    exact = isinstance(config.search.index, ExactIndex)
    searcher = Searcher(config, MinePaths.under("nowhere"))
    arguments = searcher, REUSE if exact else SEARCH, *tables(rows, results)
    try:
        expected, numbers = oracle.mine(config.model_dump(), rows, results, strict=exact)
    except oracle.NeedsSearch as error:
        with pytest.raises(NeedsSearchError) as raised:
            select_negatives(*arguments)
        assert str(raised.value) == str(error)
        return
    mined, audit = select_negatives(*arguments)
    assert mined.to_pylist() == expected
    dumped = audit.dump()
    for name in dumped.keys() - {"histograms"}:
        dumped[name] = {key: value for key, value in dumped[name].items() if value}
    assert dumped == numbers


@given(groups())
@settings(max_examples=120, deadline=None)
def test_arrays_decide_what_the_oracle_decides(drawn):
    check(*drawn)


@pytest.mark.slow
@given(groups())
@settings(max_examples=3000, deadline=None)
def test_arrays_decide_what_the_oracle_decides_in_many_cases(drawn):
    check(*drawn)


@pytest.mark.parametrize("rule", [TopKPercPos(max_negative_to_positive_ratio=0.5), SampledTopK(top=5)])
def test_more_queries_than_are_decided_together(rule):
    config = MineConfig(rule=rule, depth=6, num_negatives=3, search=SearchConfig(index=FaissFlat()))
    check(*group(Random(0), config, rule, queries=2500, documents=20, texts=9, retrievers=2))


@given(groups(), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_a_check_is_called_once_about_each_candidate_that_nothing_else_refuses(drawn, salt):
    config, rows, results = drawn
    queries, (searched, *_) = tables(rows, results)
    rankings = Rankings.read(queries, searched, config.depth)
    lowest = np.array([min(item["score"] for item in row["positives"]) for row in results[0]])
    limits, checked, expected_checked, expected = rule_limits(config.rule, lowest), [], [], []

    def refused(number, key):
        return Random(f"{salt} {number} {key}").random() < 0.5

    def codes(owner_K, at_K):
        pairs = list(zip(owner_K.tolist(), rankings.candidates.ids.take(pa.array(at_K)).to_pylist(), strict=True))
        checked.extend(pairs)
        return np.array([CODE[Reason.FILTERED] * refused(*pair) for pair in pairs], dtype=np.int8)

    for number, (query, row) in enumerate(zip(rows, results[0], strict=True)):

        def refuse(query, key, number=number):
            expected_checked.append((number, key))
            return refused(number, key) and "refused"

        rule, top = config.rule.model_dump(), float(limits.ceiling_Q[number])
        candidates = oracle.ranked(row, config.depth)[0]
        chosen_places, _ = oracle.first_negatives(
            candidates, query, row["never_hashes"], rule, top, config.num_negatives, refuse
        )
        expected.append(chosen_places)
    selection = select(rankings, limits, config.num_negatives, config.num_negatives, check=codes)
    assert sorted(checked) == sorted(expected_checked)
    scored, hashes = (column.to_pylist() for column in selection.selected.columns())
    assert [
        [(item["id"], item["score"], digest) for item, digest in zip(*lists, strict=True)]
        for lists in zip(scored, hashes, strict=True)
    ] == expected


# -- another rule on a stored search ----------------------------------------------------------------------------------


def stored(scores, searched, positive, depth):
    """(query, row) after a search of `scores` (descending); "d03" is the positive."""
    query = {"key": "x", "hash": -1, "never": ["d03"], "positives": ["d03"], "own": 1, "given": []}
    items = [{"id": f"d{place:02d}", "score": score} for place, score in enumerate(scores)]
    ceiling = oracle.ceiling(searched.model_dump(), positive)
    below = [item for item in items if item["score"] < ceiling] if math.isfinite(ceiling) else []
    lists = {"plain": items[:depth], "under": below[:depth]}
    row = {
        "example_id": "x",
        "positives": [{"id": "d03", "score": positive}],
        "ceiling": ceiling,
        "above": len(items) - len(below) if math.isfinite(ceiling) else 0,
        **lists,
        **{f"{name}_hashes": [int(item["id"][1:]) for item in items] for name, items in lists.items()},
        "never_hashes": [3],
    }
    return {**query, "text": "", "instruction": ""}, row


def chosen(stored_row, rule, positive, count, depth):
    """Ids of the negatives, or the message that names what is missing."""
    query, row = stored_row
    queries, (searched,) = tables([query], [[row]])
    limits = rule_limits(rule, np.array([positive]))
    selection = select(Rankings.read(queries, searched, depth), limits, count, count)
    return selection.missing_Q[0] or selection.selected.ids.to_pylist()


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
    truth = chosen(stored(scores, TopK(), positive, 99), rule, positive, count, 99)
    row = stored(scores, searched, positive, depth)
    candidates, gap, whole = oracle.ranked(row[1], depth)
    assert [scores[rank - 1] for rank, *_ in candidates] == [score for _, _, score, _ in candidates]
    result = chosen(row, rule, positive, count, depth)
    if isinstance(result, str):
        assert gap is not None or not whole  # something was not searched
    else:
        assert result == truth


def test_the_refusal_names_what_to_search():
    row = stored([0.9 - 0.01 * place for place in range(60)], TopKAbs(max_score=0.5), 0.95, 10)
    assert oracle.ranked(row[1], 10)[1:] == ((11, 41), False)
    assert chosen(row, TopKAbs(max_score=0.45), 0.95, 3, 10) == ["d46", "d47", "d48"]
    message = chosen(row, TopKAbs(max_score=0.7), 0.95, 3, 10)
    assert message.startswith("the rule needs ranks 11 to 41 ") and "depth 41" in message
    assert "behind 51" in chosen(row, TopKAbs(max_score=0.4), 0.95, 3, 10)


# -- what may never happen, for any scores of any sign ----------------------------------------------------------------

SCORES = st.floats(-1, 1, allow_nan=False)


def ceiling(positives, share):
    return float(ceilings(TopKPercPos(max_negative_to_positive_ratio=share), np.array([min(positives)]))[0])


@st.composite
def candidates(draw):
    count = draw(st.integers(0, 30))
    scores = sorted(draw(st.lists(SCORES, min_size=count, max_size=count)), reverse=True)
    hashes = draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))
    never = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    positives = draw(st.lists(SCORES, min_size=1, max_size=4))
    return scores, hashes, never, positives, draw(st.integers(1, 8))


def decided(scores, hashes, never, below, count):
    """The decision about one query's candidates: places of negatives, and code by place."""
    shape = 1, len(scores)
    block = Block(
        np.array(scores, dtype=np.float64).reshape(shape),
        np.ones(shape, dtype=bool),
        np.array(never, dtype=bool).reshape(shape),
        np.array(hashes, dtype=np.int64).reshape(shape),
    )
    limits = rule_limits(TopKAbs(max_score=below), np.zeros(1))
    code_BC, kept_BC = decide(block, limits, count)
    assert ((code_BC == NEGATIVE) == kept_BC).all()
    codes = {place: code for place, code in enumerate(code_BC[0].tolist()) if code != UNDECIDED}
    return np.flatnonzero(kept_BC[0]).tolist(), codes


@given(candidates(), st.floats(0.5, 1))
def test_kept_are_the_first_that_every_rule_allows(problem, share):
    scores, hashes, never, positives, count = problem
    below, lowest = ceiling(positives, share), min(positives)
    chosen_places, codes = decided(scores, hashes, never, below, count)
    for place in chosen_places:
        assert not never[place]
        assert scores[place] < lowest - (1 - share) * abs(lowest)
    kept_hashes = [hashes[place] for place in chosen_places]
    assert len(set(kept_hashes)) == len(kept_hashes) <= count
    assert sorted(codes) == list(range(len(codes)))  # a prefix: nothing better was passed over silently
    if len(chosen_places) < count:
        assert len(codes) == len(scores)
    for place in codes.keys() - set(chosen_places):
        reasons = {
            CODE[Reason.DUPLICATE_TEXT]: never[place],
            CODE[Reason.TOO_CLOSE]: scores[place] >= below,
            CODE[Reason.REPEATED_TEXT]: hashes[place] in [hashes[other] for other in chosen_places if other < place],
        }
        assert reasons[codes[place]]


@given(st.lists(SCORES, min_size=1), st.floats(0.01, 1))
def test_ceiling_is_at_or_below_the_lowest_positive_and_falls_with_the_share(positives, share):
    lowest = min(positives)
    assert ceiling(positives, share) <= lowest
    assert ceiling(positives, share) <= ceiling(positives, 1.0) == lowest
    if lowest > 0:
        assert ceiling(positives, share) == pytest.approx(share * lowest)  # the paper's own form


def test_ceiling_of_a_negative_score_is_stricter_not_looser():
    assert ceiling([-0.2], 0.95) == pytest.approx(-0.21)
    assert ceiling([0.8, 0.4], 0.95) == pytest.approx(0.38)
    assert ceiling([0.0], 0.95) == 0.0


def test_boundary_itself_is_too_close():
    assert decided([0.5], [1], [False], 0.5, 1) == ([], {0: CODE[Reason.TOO_CLOSE]})
