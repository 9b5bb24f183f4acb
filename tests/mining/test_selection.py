"""Selection rules as properties: what may never happen, for any scores of any sign."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.mining.config import TopKPercPos
from nvembed.mining.rules import ceilings
from nvembed.mining.selection import (
    ClassExamples,
    Reason,
    draw_accepted,
    draw_order,
    example_based,
    example_generator,
    select_negatives,
)
from nvembed.text.identity import text_hash

SCORES = st.floats(-1, 1, allow_nan=False)


def ceiling(positives, share):
    return float(ceilings(TopKPercPos(max_negative_to_positive_ratio=share), np.array([min(positives)]))[0])


@st.composite
def candidates(draw):
    count = draw(st.integers(0, 30))
    ids = [f"d{index}" for index in range(count)]
    scores = sorted(draw(st.lists(SCORES, min_size=count, max_size=count)), reverse=True)
    hashes = draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))
    never_ids = set(draw(st.lists(st.sampled_from(ids), max_size=5))) if ids else set()
    never_hashes = set(draw(st.lists(st.integers(0, 12), max_size=3)))
    positives = draw(st.lists(SCORES, min_size=1, max_size=4))
    return ids, scores, hashes, never_ids, never_hashes, positives, draw(st.integers(1, 8))


@given(candidates(), st.floats(0.5, 1))
def test_kept_are_the_first_that_every_rule_allows(problem, share):
    ids, scores, hashes, never_ids, never_hashes, positives, count = problem
    below = ceiling(positives, share)
    picked = select_negatives(
        ids, scores, hashes, below=below, never_ids=never_ids, never_hashes=never_hashes, count=count
    )
    lowest = min(positives)
    for index in picked.kept:
        assert ids[index] not in never_ids
        assert hashes[index] not in never_hashes
        assert scores[index] < lowest - (1 - share) * abs(lowest)
    kept_hashes = [hashes[index] for index in picked.kept]
    assert len(set(kept_hashes)) == len(kept_hashes)
    assert picked.kept == sorted(picked.kept) and len(picked.kept) <= count
    decided = sorted([*picked.kept, *picked.rejected])
    assert decided == list(range(len(decided)))  # a prefix: nothing better was passed over silently
    if len(picked.kept) < count:
        assert len(decided) == len(ids)
    for index, reason in picked.rejected.items():
        allowed = {
            Reason.KNOWN_POSITIVE: ids[index] in never_ids,
            Reason.DUPLICATE_TEXT: hashes[index] in never_hashes,
            Reason.TOO_CLOSE: scores[index] >= below,
            Reason.REPEATED_TEXT: hashes[index] in [hashes[kept] for kept in picked.kept if kept < index],
        }
        assert allowed[reason]


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
    picked = select_negatives(["a"], [0.5], [1], below=0.5, never_ids=set(), never_hashes=set(), count=1)
    assert picked.kept == [] and picked.rejected == {0: Reason.TOO_CLOSE}


def test_text_hash_ignores_case_and_white_space_only():
    assert text_hash("Heap  overflow\n") == text_hash("heap overflow")
    assert text_hash("heap overflow") != text_hash("heap overflows")
    assert -(2**63) <= text_hash("x") < 2**63


@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(0, 250))
def test_draw_order_is_distinct_and_complete(seed, population, count):
    order = draw_order(np.random.default_rng(seed), population, count)
    assert len(order) == len(set(order)) == min(count, population)
    assert all(0 <= index < population for index in order)


def test_draws_depend_on_the_example_and_are_uniform():
    counts = np.zeros(20)
    for example in range(2000):
        generator = example_generator(3, "set", f"e{example}")
        kept = draw_accepted(generator, 20, 3, lambda order: [place for place in order if place > 1])
        assert len(set(kept)) == 3
        counts[kept] += 1
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
