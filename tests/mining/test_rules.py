"""Every rule against a plain reference: one query at a time, sorting and filtering lists."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nvembed.mining.config import RankWindow, SampledTopK, TopK, TopKAbs, TopKMarginPos, TopKPercPos, TopKShifted
from nvembed.mining.rules import (
    ABSENT,
    ClassExamples,
    cap_documents,
    ceilings,
    consistent,
    draw_accepted,
    draw_order,
    draw_sampled,
    example_based,
    example_generator,
    first_allowed,
    gumbel,
    mix,
    rule_limits,
)
from nvembed.mining.selection import Block, decide

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
        values = draw(st.lists(SCORES, max_size=width))
        scores[row, : len(values)] = sorted(values, reverse=True)
    excluded = np.array(draw(st.lists(st.booleans(), min_size=queries * width, max_size=queries * width)))
    lowest = np.array(draw(st.lists(SCORES, min_size=queries, max_size=queries)))
    return scores, excluded.reshape(queries, width), lowest


@given(candidates(), RULES, st.integers(1, 8))
@settings(max_examples=150)
def test_a_rule_keeps_the_first_candidates_it_allows(problem, rule, count):
    scores, excluded, lowest = problem
    block = Block(scores, np.isfinite(scores), excluded)
    chosen = first_allowed(decide(block, rule_limits(rule, lowest), count)[1], count)
    assert chosen.shape == (len(scores), count)
    for row in range(len(scores)):
        expected = [
            column
            for column, score in enumerate(scores[row])
            if np.isfinite(score) and not excluded[row, column] and allows(rule, score, column + 1, lowest[row])
        ][:count]
        assert chosen[row].tolist() == expected + [ABSENT] * (count - len(expected))


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
    block = Block(scores, np.isfinite(scores), excluded)
    allowed = decide(block, rule_limits(rule, lowest), scores.shape[1])[1]
    queries = mix(np.arange(len(scores), dtype=np.uint64) + np.uint64(seed))
    documents = np.broadcast_to(np.arange(scores.shape[1], dtype=np.uint64), scores.shape)
    columns = draw_sampled(allowed, scores, count, rule, queries, documents)
    assert columns.shape == (len(scores), count)
    for row in range(len(scores)):
        pool = np.flatnonzero(allowed[row])[:top]
        weight = {
            column: float(gumbel(queries[row], np.uint64(column))) + scores[row, column] / (temperature or np.inf)
            for column in pool
        }
        expected = sorted(sorted(pool, key=lambda column: -weight[column])[:count])
        assert columns[row].tolist() == expected + [ABSENT] * (count - len(expected))


def test_draws_follow_their_weights():
    """Of two candidates, one e times as likely as the other; and no candidate preferred without a temperature."""
    queries = mix(np.arange(20_000, dtype=np.uint64))
    scores = np.broadcast_to([0.9, 0.8], (20_000, 2))
    documents = np.broadcast_to(np.array([3, 4], dtype=np.uint64), scores.shape)
    allowed = np.ones(scores.shape, dtype=bool)
    for temperature, share in ((None, 0.5), (0.1, np.e / (1 + np.e))):
        rule = SampledTopK(top=2, temperature=temperature)
        first = draw_sampled(allowed, scores, 1, rule, queries, documents)[:, 0]
        assert (first == 0).mean() == pytest.approx(share, abs=0.02)


@st.composite
def preferences(draw):
    queries, documents = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    lists, scores = np.full((queries, documents), ABSENT), np.full((queries, documents), -np.inf)
    for row in range(queries):
        chosen = draw(st.permutations(range(documents)))[: draw(st.integers(0, documents))]
        values = sorted(draw(st.lists(st.integers(0, 4), min_size=len(chosen), max_size=len(chosen))), reverse=True)
        lists[row, : len(chosen)], scores[row, : len(chosen)] = chosen, values
    return lists, scores, draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.randoms(use_true_random=False))


def one_at_a_time(lists, scores, count, cap, order, random):
    """Deferred acceptance as in the paper: any query with a free place asks next, in an order drawn at random."""
    requests, places = [0] * len(lists), [set() for _ in lists]
    serves = {}
    while True:
        free = [
            q
            for q in range(len(lists))
            if len(places[q]) < count and requests[q] < len(lists[q]) and lists[q][requests[q]] != ABSENT
        ]
        if not free:
            return [sorted(columns) for columns in places]
        query = random.choice(free)
        column = requests[query]
        requests[query] += 1
        document = lists[query][column]
        serves.setdefault(document, []).append((-scores[query][column], order[query], query, column))
        places[query].add(column)
        if len(serves[document]) > cap:
            worst = max(serves[document])
            serves[document].remove(worst)
            places[worst[2]].discard(worst[3])


@given(preferences())
@settings(max_examples=150)
def test_the_cap_is_deferred_acceptance_in_any_order(problem):
    lists, scores, count, cap, random = problem
    order = np.arange(len(lists))
    random.shuffle(order)
    chosen = cap_documents(lists, scores, count, cap, order)
    expected = one_at_a_time(lists, scores, count, cap, order, random)
    assert [[column for column in row if column != ABSENT] for row in chosen.tolist()] == expected
    served = [lists[row, column] for row, places in enumerate(expected) for column in places]
    assert all(served.count(document) <= cap for document in set(served))
    shuffled = random.sample(range(len(lists)), len(lists))
    assert (
        cap_documents(lists[shuffled], scores[shuffled], count, cap, order[shuffled]).tolist()
        == chosen[shuffled].tolist()
    )


@given(preferences())
def test_a_cap_that_does_not_bind_changes_nothing(problem):
    lists, scores, count, _, _ = problem
    assume(lists.size)
    assert cap_documents(lists, scores, count, len(lists)).tolist() == first_allowed(lists != ABSENT, count).tolist()


def test_consistency_keeps_examples_whose_positive_ranks_high_enough():
    assert consistent(np.array([1, 20, 21, 0]), 20).tolist() == [True, True, False, False]


def test_a_window_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValueError, match="comes before"):
        RankWindow(first=5, last=4)


# -- uniform draws -----------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(0, 250))
def test_draw_order_is_distinct_and_complete(seed, population, count):
    order = draw_order(np.random.default_rng(seed), population, count)
    assert len(order) == len(set(order)) == min(count, population)
    assert all(0 <= index < population for index in order)


def test_draws_depend_on_the_example_and_are_uniform():
    counts = np.zeros(20)
    for example in range(2000):
        generator = example_generator(3, "set", f"e{example}")
        chosen = draw_accepted(generator, 20, 3, lambda order: [place for place in order if place > 1])
        assert len(set(chosen)) == 3
        counts[chosen] += 1
    assert counts[0] == counts[1] == 0
    expected = 2000 * 3 / 18
    assert np.abs(counts[2:] - expected).max() < 5 * np.sqrt(expected)
    twice = [draw_accepted(example_generator(3, "set", "e7"), 20, 3, list) for _ in range(2)]
    assert twice[0] == twice[1] != draw_accepted(example_generator(4, "set", "e7"), 20, 3, list)


@given(
    st.lists(st.tuples(st.sampled_from("XYZ"), st.integers(0, 9)), min_size=2, max_size=30),
    st.integers(0, 100),
    st.integers(1, 6),
)
def test_example_based_pairs(rows, seed, count):
    ids = [f"e{index:02d}" for index in range(len(rows))]
    labels, hashes = [label for label, _ in rows], [digest for _, digest in rows]
    texts = ClassExamples.build(ids, labels, hashes)
    shuffled = np.random.default_rng(seed).permutation(len(ids))
    again = ClassExamples.build(*([values[index] for index in shuffled] for values in (ids, labels, hashes)))
    by_id = dict(zip(ids, rows, strict=True))
    for example, (label, digest) in by_id.items():
        drawn = example_based(example_generator(seed, "set", example), texts, example, label, digest, count)
        same = example_based(example_generator(seed, "set", example), again, example, label, digest, count)
        assert drawn == same  # the order of the rows does not matter
        possible = [key for key, row in by_id.items() if row[0] == label and row[1] != digest and key != example]
        if drawn is None:
            assert not possible
            continue
        positive, negatives = drawn
        assert positive in possible
        used = [by_id[key][1] for key in negatives]
        assert all(by_id[key][0] != label for key in negatives)
        assert len(set(used)) == len(used) and not {digest, by_id[positive][1]} & set(used)
        others = {row[1] for row in rows if row[0] != label} - {digest, by_id[positive][1]}
        assert len(negatives) == min(count, len(others))
