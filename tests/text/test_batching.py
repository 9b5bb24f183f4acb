"""Chunks: every text once, within the budget, balanced, the same for every rank that asks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.text.batching import plan_chunks, token_budget_chunks

LENGTHS = st.lists(st.integers(1, 100), max_size=60)


def cost(lengths, chunk):
    return len(chunk) * int(lengths[chunk].max()) if len(chunk) else 0


@given(LENGTHS, st.integers(1, 400))
def test_chunks_hold_each_text_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths, dtype=np.int32)
    chunks = token_budget_chunks(lengths, budget)
    assert sorted(np.concatenate([*chunks, np.empty(0, int)]).tolist()) == list(range(len(lengths)))
    for chunk in chunks:
        assert chunk.dtype == np.int64 and len(chunk)
        assert cost(lengths, chunk) <= budget or len(chunk) == 1
    flat = [int(lengths[index]) for chunk in chunks for index in chunk]
    assert flat == sorted(flat, reverse=True)


def test_greedy_cut_has_the_fewest_chunks():
    lengths = np.array([10, 9, 5, 5, 5, 1, 1, 1])
    assert [chunk.tolist() for chunk in token_budget_chunks(lengths, 20)] == [[0, 1], [2, 3, 4, 5], [6, 7]]


def test_an_over_long_text_is_a_chunk_of_its_own():
    assert [chunk.tolist() for chunk in token_budget_chunks(np.array([3, 500, 3]), 6)] == [[1], [0, 2]]


@given(st.lists(st.integers(0, 100), max_size=60), st.integers(1, 400), st.integers(1, 5))
def test_plan_covers_present_texts_once_and_ranks_have_equally_many_chunks(lengths, budget, world_size):
    lengths = np.array(lengths, dtype=np.int32)
    plan = plan_chunks(lengths, budget, world_size)
    assert len(plan) == world_size
    assert len({len(chunks) for chunks in plan}) == 1 and len(plan[0]) >= 1
    dealt = np.concatenate([chunk for chunks in plan for chunk in chunks])
    assert sorted(dealt.tolist()) == np.flatnonzero(lengths).tolist()
    for chunk in (chunk for chunks in plan for chunk in chunks):
        assert chunk.dtype == np.int64
        assert cost(lengths, chunk) <= budget or len(chunk) == 1
    again = plan_chunks(lengths, budget, world_size)
    assert all(np.array_equal(a, b) for x, y in zip(plan, again, strict=True) for a, b in zip(x, y, strict=True))


@given(LENGTHS.filter(bool), st.integers(100, 400), st.integers(1, 4))
def test_no_more_chunks_per_rank_than_the_budget_needs(lengths, budget, world_size):
    lengths = np.array(lengths)
    needed = -(-len(token_budget_chunks(lengths, budget)) // world_size)
    assert len(plan_chunks(lengths, budget, world_size)[0]) == needed


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("budget", [600, 2000, 10**6])
def test_ranks_are_balanced_by_tokens(world_size, budget):
    lengths = np.random.default_rng(0).integers(8, 80, size=512)
    plan = plan_chunks(lengths, budget, world_size)
    loads = [sum(cost(lengths, chunk) for chunk in chunks) for chunks in plan]
    assert max(loads) <= 1.05 * np.mean(loads)
    padded = sum(loads) / lengths.sum()
    assert padded < 1.6  # dealing by length keeps padding low even with one chunk per rank


def test_nothing_present_still_gives_every_rank_one_empty_chunk():
    plan = plan_chunks(np.zeros(4, dtype=np.int32), 100, 2)
    assert [[chunk.tolist() for chunk in chunks] for chunks in plan] == [[[]], [[]]]
