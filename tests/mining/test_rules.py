"""Every rule against a plain reference: one query at a time, sorting and filtering lists."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nvembed.mining.config import RankWindow, SampledTopK, TopK, TopKAbs, TopKMarginPos, TopKPercPos, TopKShifted
from nvembed.mining.rules import (
    FREE,
    cap_documents,
    ceilings,
    consistent,
    drawn,
    eligible,
    first_allowed,
    gumbel,
    mix,
    rule_limits,
)

SCORES = st.floats(-1, 1, allow_nan=False, width=32)
RULES = st.one_of(
    st.just(TopK()),
    st.builds(TopKShifted, shift=st.integers(0, 12)),
    st.builds(TopKAbs, max_score=SCORES),
    st.builds(TopKMarginPos, margin=st.floats(0, 1)),
    st.builds(TopKPercPos, max_negative_to_positive_ratio=st.floats(0.1, 1)),
    st.integers(1, 12).flatmap(lambda first: st.builds(RankWindow, first=st.just(first), last=st.integers(first, 20))),
)


def allows(rule, score, rank, lowest):
    """A rule in words, for one candidate."""
    match rule:
        case TopKShifted():
            return rank > rule.shift
        case TopKAbs():
            return score < rule.max_score
        case TopKMarginPos():
            return score < lowest - rule.margin
        case TopKPercPos():
            return score < lowest - (1 - rule.max_negative_to_positive_ratio) * abs(lowest)
        case RankWindow():
            return rule.first <= rank <= rule.last
        case _:
            return True


@st.composite
def candidates(draw):
    queries, width = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    scores = np.full((queries, width), -np.inf)
    for row in range(queries):
        found = draw(st.lists(SCORES, max_size=width))
        scores[row, : len(found)] = sorted(found, reverse=True)
    excluded = np.array(draw(st.lists(st.booleans(), min_size=queries * width, max_size=queries * width)))
    lowest = np.array(draw(st.lists(SCORES, min_size=queries, max_size=queries)))
    return scores, excluded.reshape(queries, width), lowest


@given(candidates(), RULES, st.integers(1, 8))
@settings(max_examples=150)
def test_a_rule_keeps_the_first_candidates_it_allows(problem, rule, count):
    scores, excluded, lowest = problem
    ranks = np.broadcast_to(np.arange(1, scores.shape[1] + 1), scores.shape)
    kept = first_allowed(eligible(scores, ranks, rule_limits(rule, lowest), excluded), count)
    assert kept.shape == (len(scores), count)
    for row in range(len(scores)):
        expected = [
            column
            for column, score in enumerate(scores[row])
            if np.isfinite(score) and not excluded[row, column] and allows(rule, score, column + 1, lowest[row])
        ][:count]
        assert kept[row].tolist() == expected + [FREE] * (count - len(expected))


def test_ceilings_in_numbers():
    lowest = np.array([0.8, -0.2, 0.0])
    np.testing.assert_allclose(ceilings(TopKPercPos(max_negative_to_positive_ratio=0.95), lowest), [0.76, -0.21, 0.0])
    np.testing.assert_allclose(ceilings(TopKMarginPos(margin=0.05), lowest), [0.75, -0.25, -0.05])
    assert ceilings(TopKAbs(max_score=0.7), lowest).tolist() == [0.7] * 3
    assert np.isposinf(ceilings(TopK(), lowest)).all()
    sampled = SampledTopK(ceiling=TopKAbs(max_score=0.5))
    assert ceilings(sampled, lowest).tolist() == [0.5] * 3


@given(candidates(), st.integers(1, 6), st.integers(1, 8), st.sampled_from([None, 0.1, 1.0]), st.integers(0, 9))
@settings(max_examples=80)
def test_a_draw_takes_the_largest_noisy_weights_of_the_pool(problem, count, top, temperature, seed):
    scores, excluded, lowest = problem
    rule = SampledTopK(top=top, temperature=temperature)
    ranks = np.broadcast_to(np.arange(1, scores.shape[1] + 1), scores.shape)
    allowed = eligible(scores, ranks, rule_limits(rule, lowest), excluded)
    queries = mix(np.arange(len(scores), dtype=np.uint64) + np.uint64(seed))
    documents = np.broadcast_to(np.arange(scores.shape[1], dtype=np.uint64), scores.shape)
    found = drawn(allowed, scores, count, rule, queries, documents)
    assert found.shape == (len(scores), count)
    for row in range(len(scores)):
        pool = np.flatnonzero(allowed[row])[:top]
        weight = {
            column: float(gumbel(queries[row], np.uint64(column))) + scores[row, column] / (temperature or np.inf)
            for column in pool
        }
        expected = sorted(sorted(pool, key=lambda column: -weight[column])[:count])
        assert found[row].tolist() == expected + [FREE] * (count - len(expected))


def test_draws_follow_their_weights():
    """Of two candidates, one e times as likely as the other; and no candidate preferred without a temperature."""
    queries = mix(np.arange(20_000, dtype=np.uint64))
    scores = np.broadcast_to([0.9, 0.8], (20_000, 2))
    documents = np.broadcast_to(np.array([3, 4], dtype=np.uint64), scores.shape)
    allowed = np.ones(scores.shape, dtype=bool)
    for temperature, share in ((None, 0.5), (0.1, np.e / (1 + np.e))):
        rule = SampledTopK(top=2, temperature=temperature)
        first = drawn(allowed, scores, 1, rule, queries, documents)[:, 0]
        assert (first == 0).mean() == pytest.approx(share, abs=0.02)


@st.composite
def preferences(draw):
    queries, documents = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    lists, scores = np.full((queries, documents), FREE), np.full((queries, documents), -np.inf)
    for row in range(queries):
        chosen = draw(st.permutations(range(documents)))[: draw(st.integers(0, documents))]
        values = sorted(draw(st.lists(st.integers(0, 4), min_size=len(chosen), max_size=len(chosen))), reverse=True)
        lists[row, : len(chosen)], scores[row, : len(chosen)] = chosen, values
    return lists, scores, draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.randoms(use_true_random=False))


def one_at_a_time(lists, scores, count, cap, order, random):
    """Deferred acceptance as in the paper: any query with a free place asks next, in an order drawn at random."""
    asked, held = [0] * len(lists), [set() for _ in lists]
    serves = {}
    while True:
        free = [
            q
            for q in range(len(lists))
            if len(held[q]) < count and asked[q] < len(lists[q]) and lists[q][asked[q]] != FREE
        ]
        if not free:
            return [sorted(places) for places in held]
        query = random.choice(free)
        column = asked[query]
        asked[query] += 1
        document = lists[query][column]
        serves.setdefault(document, []).append((-scores[query][column], order[query], query, column))
        held[query].add(column)
        if len(serves[document]) > cap:
            worst = max(serves[document])
            serves[document].remove(worst)
            held[worst[2]].discard(worst[3])


@given(preferences())
@settings(max_examples=150)
def test_the_cap_is_deferred_acceptance_in_any_order(problem):
    lists, scores, count, cap, random = problem
    order = np.arange(len(lists))
    random.shuffle(order)
    kept = cap_documents(lists, scores, count, cap, order)
    expected = one_at_a_time(lists, scores, count, cap, order, random)
    assert [[column for column in row if column != FREE] for row in kept.tolist()] == expected
    served = [lists[row, column] for row, places in enumerate(expected) for column in places]
    assert all(served.count(document) <= cap for document in set(served))
    shuffled = random.sample(range(len(lists)), len(lists))
    assert (
        cap_documents(lists[shuffled], scores[shuffled], count, cap, order[shuffled]).tolist()
        == kept[shuffled].tolist()
    )


@given(preferences())
def test_a_cap_that_does_not_bind_changes_nothing(problem):
    lists, scores, count, _, _ = problem
    assume(lists.size)
    assert cap_documents(lists, scores, count, len(lists)).tolist() == first_allowed(lists != FREE, count).tolist()


def test_consistency_keeps_examples_whose_positive_ranks_high_enough():
    assert consistent(np.array([1, 20, 21, 0]), 20).tolist() == [True, True, False, False]


def test_a_window_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValueError, match="comes before"):
        RankWindow(first=5, last=4)
