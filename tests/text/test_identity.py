"""When two texts count as the same, and how much of their words they share."""

import pytest

from nvembed.text.identity import jaccard, text_hash, word_triples


def test_text_hash_ignores_case_and_white_space_only():
    assert text_hash("Heap  overflow\n") == text_hash("heap overflow")
    assert text_hash("heap overflow") != text_hash("heap overflows")
    assert -(2**63) <= text_hash("x") < 2**63


def test_near_duplicates_are_shared_word_triples():
    assert jaccard(word_triples("one two three four"), word_triples("one two three four")) == 1.0
    assert jaccard(word_triples("One two three four"), word_triples("two three four five")) == pytest.approx(1 / 3)
    assert jaccard(word_triples("缓冲区溢出漏洞"), word_triples("缓冲区溢出的漏洞")) > 0.2
    assert jaccard(word_triples(""), frozenset()) == 0.0
