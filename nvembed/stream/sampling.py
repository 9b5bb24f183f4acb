"""Deterministic sampling: which example gets which slot of a training stream, from ids, weights and seed alone.

Every data set has an endless sequence of its examples: a permutation by seeded hash for each epoch, one after the
other. A batch takes from it in order, but passes over (for now) an example whose positive document it already holds.
Nothing here knows the number of steps or of ranks: a longer stream begins with the shorter one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nvembed.text.identity import mix_seeded, signed_hash
from nvembed.types import UserError

LOOK_AHEAD = 4  # a batch looks this many times its wanted size ahead for an example with a new positive


def permutation(keys: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Order of an epoch: argsort of the keys' hashes under (seed, epoch); int64 [N]."""
    return np.argsort(mix_seeded(keys, signed_hash("epoch", seed, epoch)), kind="stable")


def draw(count: int, key: int, *parts: object) -> int:
    """A number below `count`, by hash of an example's key and the parts."""
    return signed_hash(key, *parts) % count


def sample(candidates: Sequence[str], count: int, key: int, *parts: object) -> list[str]:
    """`count` of the candidates (all, when there are fewer), by hash, in their own order."""
    chosen = sorted(range(len(candidates)), key=lambda place: signed_hash(key, place, *parts))[:count]
    return [candidates[place] for place in sorted(chosen)]


class Sequencer:
    """The endless sequence of one data set.

    Args:
        keys: int64 [N], one per example; they decide the order.
        positives: for each example the int64 keys of its positive documents; one is drawn per epoch.
        seed: of the stream and data set.
    """

    def __init__(self, keys: np.ndarray, positives: Sequence[np.ndarray], seed: int) -> None:
        self._keys, self._positives, self._seed = keys, positives, seed
        self._epoch = -1
        self._waiting: list[int] = []

    def take(self, count: int, used_keys: set[int]) -> list[tuple[int, int, int]]:
        """The next `count` examples for one batch: (example, epoch, place of its positive).

        Args:
            used_keys: keys of the examples and positive documents already in the batch; those taken are added.
        """
        taken: list[tuple[int, int, int]] = []
        while len(taken) < count:
            if not self._waiting:
                self._epoch += 1
                self._waiting = permutation(self._keys, self._seed, self._epoch)[::-1].tolist()
            taken += self._take_from_epoch(count - len(taken), used_keys)
        return taken

    def _take_from_epoch(self, count: int, used_keys: set[int]) -> list[tuple[int, int, int]]:
        """Take from the running epoch only: all of it goes before any example comes again."""
        window = [self._waiting.pop() for _ in range(min(len(self._waiting), LOOK_AHEAD * count))]
        first: list[tuple[int, int, int]] = []
        repeats: list[int] = []
        for example in window:
            place = self._place(example)
            keys = {int(self._keys[example]), int(self._positives[example][place])}
            if len(first) < count and not keys & used_keys:
                used_keys |= keys
                first.append((example, self._epoch, place))
            else:
                repeats.append(example)
        for example in repeats[: count - len(first)]:  # nothing better in sight: its known positives are masked anyway
            first.append((example, self._epoch, self._place(example)))
        used = {example for example, _, _ in first}
        self._waiting += [example for example in reversed(window) if example not in used]
        return first

    def _place(self, example: int) -> int:
        return draw(len(self._positives[example]), int(self._keys[example]), self._seed, self._epoch)


def mixture(weights: Mapping[str, float], sizes: Mapping[str, int], exponent: float) -> dict[str, float]:
    """Share of each data set, not yet divided by their sum: weight x size ** exponent.

    Exponent 0 takes the weights as they are, 1 makes every example equally frequent under equal weights; between
    them small sets are drawn more often than their size, large ones less (temperature sampling, T = 1 / exponent).
    """
    return {name: weight * float(max(sizes[name], 1)) ** exponent for name, weight in weights.items()}


def interleave(shares: Sequence[float]) -> Iterator[int]:
    """Endless order of data sets: the one furthest behind its share is next, ties to the first."""
    weights = np.asarray(shares, np.float64) / sum(shares)
    owed = np.zeros(len(weights))
    while True:
        owed += weights
        chosen = int(np.argmax(owed))
        owed[chosen] -= 1.0
        yield chosen


@dataclass(frozen=True)
class Population:
    """The usable examples of one data set: keys int64 [N] and the keys of each one's positives."""

    name: str
    keys: np.ndarray
    positives: Sequence[np.ndarray]


@dataclass(frozen=True)
class Slot:
    """One example's place: which data set, which of its usable examples, in which epoch, with which positive."""

    dataset: int
    example: int
    epoch: int
    positive: int


def slots(
    populations: Sequence[Population],
    shares: Sequence[float],
    *,
    batch_size: int,
    batching: Literal["homogeneous", "blended"],
    seed: int,
) -> Iterator[list[Slot]]:
    """Endless batches, in order.

    Raises:
        UserError: a data set has fewer usable examples than one batch needs of it.
    """
    total = sum(shares)
    for population, share in zip(populations, shares, strict=True):
        needed = batch_size if batching == "homogeneous" else int(np.ceil(batch_size * share / total))
        if (usable := len(population.keys)) < needed:
            raise UserError(
                f"data set {population.name}: {usable} usable training examples, but one {batching} batch takes "
                f"{needed}. Lower global_batch_size or its weight, or prepare more examples (max_train, "
                "max_documents)."
            )
    sequencers = [Sequencer(item.keys, item.positives, signed_hash("order", seed, item.name)) for item in populations]
    order = interleave(shares)
    while True:
        used_keys: set[int] = set()
        batch: list[Slot] = []
        if batching == "homogeneous":
            chosen = next(order)
            batch = [Slot(chosen, *taken) for taken in sequencers[chosen].take(batch_size, used_keys)]
        else:
            places = [next(order) for _ in range(batch_size)]
            queues = {item: iter(sequencers[item].take(places.count(item), used_keys)) for item in sorted(set(places))}
            batch = [Slot(item, *next(queues[item])) for item in places]
        yield batch
