"""When two texts count as the same, and how much of their words they share."""

import numpy as np
import pytest

from nvembed.text.identity import jaccard, mix, text_hash, word_triples


def test_text_hash_ignores_case_and_white_space_only():
    assert text_hash("Heap  overflow\n") == text_hash("heap overflow")
    assert text_hash("heap overflow") != text_hash("heap overflows")
    assert -(2**63) <= text_hash("x") < 2**63


def test_near_duplicates_are_shared_word_triples():
    assert jaccard(word_triples("one two three four"), word_triples("one two three four")) == 1.0
    assert jaccard(word_triples("One two three four"), word_triples("two three four five")) == pytest.approx(1 / 3)
    assert jaccard(word_triples("缓冲区溢出漏洞"), word_triples("缓冲区溢出的漏洞")) > 0.2
    assert jaccard(word_triples(""), frozenset()) == 0.0


def test_sorted_arrays_have_the_similarity_of_their_sets():
    left, right = np.array([1, 3, 5, 2**63], np.uint64), np.array([3, 4, 2**63], np.uint64)
    assert jaccard(left, right) == jaccard(set(left.tolist()), set(right.tolist())) == 0.4
    assert jaccard(left[:0], right[:0]) == 0.0


def test_mixing_is_that_of_splitmix64():
    """The first numbers of its published sequence from the seed 1234567; draws of mining depend on them."""
    seeds = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(seeds).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
