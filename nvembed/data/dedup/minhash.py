"""Word shingles as hashes, MinHash signatures and LSH bands of many texts at once; pure numpy.

Signatures are those of datasketch (`affine32` scheme) over the low halves of the shingle hashes, and the bands are cut
as its `MinHashLSH` cuts them; tests hold both equal. Shapes: N texts, M shingles of all of them, P permutations.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from nvembed.text.identity import words_of

_FOLD = np.uint64(0x9E3779B97F4A7C15)
_CACHED_WORDS = 1 << 20  # about 100 MB of words and hashes


class Ragged(NamedTuple):
    """Rows of different lengths: `flat` uint64 [M], row i is `flat[starts[i]:starts[i + 1]]`; int64 [N + 1]."""

    flat: np.ndarray
    starts: np.ndarray

    def row(self, index: int) -> np.ndarray:
        """One row."""
        return self.flat[self.starts[index] : self.starts[index + 1]]


class _Cache(dict[str, int]):
    """64-bit hash of each word seen."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _CACHED_WORDS:
            self.clear()
        value = self[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return value


class WordHashes:
    """Hashes of words; keeps those of words it has seen."""

    def __init__(self) -> None:
        self._cache = _Cache()

    def words(self, texts: Sequence[str]) -> Ragged:
        """Hash of every word of every text."""
        cache = self._cache
        rows = [[cache[word] for word in words_of(text)] for text in texts]
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        flat = np.fromiter((value for row in rows for value in row), np.uint64, int(starts[-1]))
        return Ragged(flat, starts)


def runs(words: Ragged, length: int) -> Ragged:
    """Hash of every run of `length` words of each row; of a shorter row, of all its words together.

    The shingles of the texts, repeats included.
    """
    sizes = np.diff(words.starts)
    counts = np.maximum(sizes - length + 1, 1)
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    flat = np.empty(int(starts[-1]), np.uint64)
    long = sizes >= length
    if long.any():
        rolled = _rolled(words.flat, length)
        place = np.arange(len(flat)) - np.repeat(starts[:-1], counts) + np.repeat(words.starts[:-1], counts)
        chosen = np.repeat(long, counts)
        flat[chosen] = rolled[place[chosen]]
    for row in np.flatnonzero(~long).tolist():
        flat[starts[row]] = _folded(words.row(row))
    return Ragged(flat, starts)


def _rolled(word_M: np.ndarray, length: int) -> np.ndarray:
    """Hash of the run that starts at each word; runs over the end are left out."""
    total = len(word_M) - length + 1
    with np.errstate(over="ignore"):
        mixed = _mixed(word_M[:total])
        for offset in range(1, length):
            mixed = _mixed(mixed * _FOLD + word_M[offset : offset + total])
    return mixed


def _folded(word_M: np.ndarray) -> np.uint64:
    """The value of `_rolled` for one run of all the words; 0 for none."""
    return np.uint64(_rolled(word_M, len(word_M))[0]) if len(word_M) else np.uint64(0)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3 for 64 bits."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    return values ^ (values >> np.uint64(33))


# -- MinHash ----------------------------------------------------------------------------------------------------------


def signatures(shingle_hashes: Ragged, num_perm: int, seed: int) -> np.ndarray:
    """uint32 [N, P]: the smallest permuted shingle of each text, for each permutation."""
    generator = np.random.RandomState(seed)  # the legacy generator, as datasketch draws
    factors = generator.randint(0, 1 << 31, num_perm, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    offsets = generator.randint(0, 1 << 32, num_perm, dtype=np.uint32)
    signature_NP = np.empty((len(shingle_hashes.starts) - 1, num_perm), np.uint32)
    with np.errstate(over="ignore"):
        hash_M = _mixed_32(shingle_hashes.flat.astype(np.uint32))
        for column in range(num_perm):
            permuted = hash_M * factors[column] + offsets[column]
            signature_NP[:, column] = np.minimum.reduceat(permuted, shingle_hashes.starts[:-1])
    return signature_NP


def _mixed_32(values: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3 for 32 bits."""
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return values ^ (values >> np.uint32(16))


@functools.lru_cache(maxsize=16)
def band_shape(threshold: float, num_perm: int) -> tuple[int, int]:
    """(bands, rows): the cut with the least area of false candidates below and misses above the threshold."""
    from scipy.integrate import quad

    def error(bands: int, rows: int) -> float:
        below, _ = quad(lambda s: 1 - (1 - s**rows) ** bands, 0.0, threshold)
        above, _ = quad(lambda s: (1 - s**rows) ** bands, threshold, 1.0)
        return float(0.5 * below + 0.5 * above)

    shapes = [(bands, rows) for bands in range(1, num_perm + 1) for rows in range(1, num_perm // bands + 1)]
    return min(shapes, key=lambda shape: error(*shape))


def band_keys(signature_NP: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """uint64 [N, bands]: equal where two texts agree in all rows of a band; different bands have different keys."""
    key_NB = np.empty((len(signature_NP), bands), np.uint64)
    with np.errstate(over="ignore"):
        for band in range(bands):
            key = np.full(len(signature_NP), band + 1, np.uint64) * _FOLD
            for column in range(band * rows, (band + 1) * rows):
                key = _mixed(key * _FOLD + signature_NP[:, column].astype(np.uint64))
            key_NB[:, band] = key
    return key_NB
