"""Order of the stream: exactly once an epoch, shares as stated, prefixes equal, few repeats in a batch."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.stream.sampling import Population, Sequencer, draw, interleave, permutation, sample, slots
from nvembed.text.identity import document_key, mix_seeded, signed_hash
from nvembed.types import UserError


def population(name: str, count: int, documents: int | None = None) -> Population:
    """Examples over `documents` distinct positives (all distinct by default)."""
    keys = np.array([signed_hash(name, number) for number in range(count)], np.int64)
    positives = [np.array([document_key(name, str(number % (documents or count)))]) for number in range(count)]
    return Population(name, keys, positives)


def take(items: list[Population], shares: list[float], steps: int, **options: object) -> list[list[tuple[int, ...]]]:
    batches = slots(items, shares, **options)  # type: ignore[arg-type]
    return [[(s.dataset, s.example, s.epoch, s.positive) for s in batch] for batch in itertools.islice(batches, steps)]


def test_keys_are_fixed_for_ever() -> None:
    """Golden values: another order would change every recorded run."""
    assert document_key("cwe", "CWE-79") == 5041140003817228776
    assert mix_seeded(np.array([0, 1, -1]), 7).tolist() == [
        6046182337176849984,
        618749050156288463,
        16833659608792918315,
    ]
    assert permutation(np.arange(8), seed=17, epoch=0).tolist() == [7, 5, 2, 0, 6, 1, 4, 3]
    assert draw(1000, 5, "a", 3) == 315


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 5), st.integers(1, 9))
def test_every_example_comes_once_before_any_comes_again(count: int, batch: int, seed: int, documents: int) -> None:
    item = population("a", count, documents)
    sequencer = Sequencer(item.keys, item.positives, seed)
    taken = list(itertools.chain.from_iterable(sequencer.take(batch, set()) for _ in range(3 * count)))
    for start in range(0, len(taken) - count + 1, count):
        epoch = taken[start : start + count]
        assert sorted(example for example, _, _ in epoch) == list(range(count))
        assert {number for _, number, _ in epoch} == {start // count}


@given(st.lists(st.floats(0.05, 10), min_size=1, max_size=6), st.integers(1, 400))
def test_shares_are_kept(shares: list[float], length: int) -> None:
    counts = Counter(itertools.islice(interleave(shares), length))
    for place, share in enumerate(shares):
        assert abs(counts[place] - length * share / sum(shares)) < max(2, len(shares))


@settings(max_examples=40)
@given(
    st.lists(st.integers(12, 40), min_size=1, max_size=4),
    st.sampled_from(["homogeneous", "blended"]),
    st.integers(0, 2**40),
    st.integers(1, 12),
)
def test_a_longer_stream_begins_with_the_shorter(sizes: list[int], batching: str, seed: int, batch: int) -> None:
    items = [population(str(place), size) for place, size in enumerate(sizes)]
    options = {"batch_size": batch, "batching": batching, "seed": seed}
    shares = [1.0 + place for place in range(len(items))]
    long = take(items, shares, 12, **options)
    assert take(items, shares, 5, **options) == long[:5]
    assert all(len(row) == batch for row in long)
    if batching == "homogeneous":
        assert all(len({slot[0] for slot in row}) == 1 for row in long)


def test_the_seed_and_the_epoch_change_the_order() -> None:
    item = population("a", 64)
    options = {"batch_size": 64, "batching": "homogeneous"}
    first, second = take([item], [1.0], 2, seed=1, **options)
    other = take([item], [1.0], 1, seed=2, **options)[0]
    orders = [[slot[1] for slot in batch] for batch in (first, second, other)]
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_the_order_does_not_depend_on_the_order_of_the_file() -> None:
    item = population("a", 50)
    shuffled = np.random.default_rng(0).permutation(50)
    other = Population("a", item.keys[shuffled], [item.positives[place] for place in shuffled])
    options = {"batch_size": 10, "batching": "homogeneous", "seed": 3}
    plain = [[item.keys[slot[1]] for slot in batch] for batch in take([item], [1.0], 9, **options)]
    moved = [[other.keys[slot[1]] for slot in batch] for batch in take([other], [1.0], 9, **options)]
    assert plain == moved


@pytest.mark.parametrize("batching", ["homogeneous", "blended"])
def test_no_batch_holds_a_positive_or_an_example_twice_where_that_can_be(batching: str) -> None:
    items = [population("a", 90, documents=30), population("b", 80)]
    batches = take(items, [1, 1], 40, batch_size=8, batching=batching, seed=5)
    repeats = 0
    for batch in batches:
        documents = [items[slot[0]].positives[slot[1]][slot[3]] for slot in batch]
        repeats += len(documents) - len(set(documents))
        assert len({slot[:2] for slot in batch}) == len(batch)
    assert repeats <= 2  # the end of an epoch has no choice


def test_too_few_examples_are_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"data set a: 5 usable .* takes 8.*max_train"):
        next(slots([population("a", 5)], [1.0], batch_size=8, batching="homogeneous", seed=0))
    batch = next(slots([population("a", 5), population("b", 5)], [1, 1], batch_size=8, batching="blended", seed=0))
    assert len(batch) == 8


@given(st.lists(st.text(max_size=3), max_size=12), st.integers(0, 12), st.integers(), st.integers())
def test_samples_keep_their_order(candidates: list[str], count: int, key: int, part: int) -> None:
    chosen = sample(candidates, count, key, part)
    assert len(chosen) == min(count, len(candidates))
    places = iter(candidates)
    assert all(any(item == other for other in places) for item in chosen)
    assert chosen == sample(candidates, count, key, part)
    assert 0 <= draw(7, key, part) < 7
