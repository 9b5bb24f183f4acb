"""Every present text is embedded once, every rank does equally many forwards, and nothing exceeds the budget."""

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_kit import make_batch, tiny_embedder

from nvembed.training.arithmetic import MIN_SLICE, slice_budget
from nvembed.training.sharding import Sharding, shard
from nvembed.types import Batch

TEMPLATE = make_batch(tiny_embedder().tokeniser, 0)


def batch_of(lengths: list[int]) -> Batch:
    return dataclasses.replace(TEMPLATE, token_lengths=np.array(lengths, np.int32), texts=[""] * len(lengths))


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=24, max_size=24).filter(any),
    budget=st.integers(8, 600),
    slices=st.one_of(st.none(), st.integers(8, 600)),
    world=st.integers(1, 4),
)
def test_chunks_and_slices(lengths: list[int], budget: int, slices: int | None, world: int) -> None:
    batch = batch_of(lengths)
    sharding = shard(batch, budget, 0, world, slice_budget=slices)
    shapes = [[len(chunk) for chunk in chunks] for chunks in sharding.chunks]
    assert all(shape == shapes[0] for shape in shapes)
    seen = [int(t) for chunks in sharding.chunks for chunk in chunks for part in chunk for t in part]
    assert sorted(seen) == [t for t, length in enumerate(lengths) if length]
    for chunks in sharding.chunks:
        for chunk in chunks:
            sizes = [len(part) * max(lengths[t] for t in part) if len(part) else 0 for part in chunk]
            assert sum(sizes) <= budget or len([size for size in sizes if size]) <= 1
            for part, size in zip(chunk, sizes, strict=True):
                assert size <= min(budget, slices or budget) or len(part) == 1
    assert sum(sharding.counts) == len(seen)
    other = shard(batch, budget, world - 1, world, slice_budget=slices)
    assert all(np.array_equal(a, b) for a, b in zip(_parts(sharding), _parts(other), strict=True))


def _parts(sharding: Sharding) -> list[np.ndarray]:
    return [part for chunks in sharding.chunks for chunk in chunks for part in chunk]


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), min_size=24, max_size=24).filter(any), budget=st.integers(8, 300))
def test_gather_puts_rows_where_their_texts_are(lengths: list[int], budget: int) -> None:
    sharding = shard(batch_of(lengths), budget, 0, 1)
    order = [t for chunk in sharding.own_chunks for part in chunk for t in part]
    rows = torch.tensor([[float(t), 1.0] for t in order], requires_grad=True)
    whole = sharding.gather(rows)
    expected = [[float(t), 1.0] if length else [0.0, 0.0] for t, length in enumerate(lengths)]
    assert whole.tolist() == expected
    (whole[:, 0] * torch.arange(24.0)).sum().backward()
    assert rows.grad is not None and rows.grad[:, 0].tolist() == [float(t) for t in order]


@given(world=st.integers(1, 8))
def test_rows_of_the_ranks_make_up_the_batch(world: int) -> None:
    slices = [Sharding(TEMPLATE, r, [[]] * world).rows for r in range(world)]
    assert [i for rows in slices for i in range(*rows.indices(8))] == list(range(8))


def test_slices_are_a_share_of_the_budget_but_not_under_zero_3() -> None:
    assert slice_budget(8192, 2, "cpu") == 512
    assert slice_budget(8192, 3, "cpu") == 8192
    assert slice_budget(1024, 0, "cpu") == MIN_SLICE["cpu"]
    assert slice_budget(100, 0, "cpu") == 100
    assert slice_budget(65536, 2, "cuda") == MIN_SLICE["cuda"]
