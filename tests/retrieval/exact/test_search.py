"""Exact search: against a naive oracle, and the same bytes for any division into shards and blocks."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.retrieval.exact.search import order_by_score, pair_scores, search_exact


def naive(query_QD, ids, document_ND, k, below=None):
    """Rational arithmetic and a plain sort: no code in common with the search. For vectors whose dots fp64 holds."""
    found = []
    for position, query in enumerate(query_QD):
        scored = [
            (sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(query, document, strict=True)), key)
            for key, document in zip(ids, document_ND, strict=True)
        ]
        if below is not None:
            scored = [(score, key) for score, key in scored if score < Fraction(float(below[position]))]
        found.append(sorted(scored, key=lambda item: (-item[0], item[1]))[:k])
    return found


def cut(ids, document_ND, edges):
    edges = [0, *sorted(edges), len(ids)]
    return [(ids[a:b], document_ND[a:b]) for a, b in itertools.pairwise(edges)]


@st.composite
def problems(draw):
    """Small integer vectors (every dot exact, many ties, many duplicates), any division, any k."""
    count, queries, dim = draw(st.integers(1, 40)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    values = st.integers(-3, 3)
    rows = st.lists(values, min_size=dim, max_size=dim)
    distinct = draw(st.lists(rows, min_size=1, max_size=8))
    choice = draw(st.lists(st.integers(0, len(distinct) - 1), min_size=count, max_size=count))
    documents = np.array([distinct[index] for index in choice], dtype=np.float32)
    query = np.array(draw(st.lists(rows, min_size=queries, max_size=queries)), dtype=np.float32)
    ids = [f"d{number}" for number in draw(st.permutations(range(count)))]
    edges = draw(st.lists(st.integers(0, count), max_size=4))
    return query, ids, documents, edges, draw(st.integers(1, 12)), draw(st.integers(1, 20))


@given(problems())
@settings(max_examples=150, deadline=None)
def test_equals_the_naive_oracle_with_ties_for_any_division(problem):
    query, ids, documents, edges, k, block = problem
    found, scores = search_exact(query, cut(ids, documents, edges), k, block)
    for row, (keys, expected) in enumerate(zip(found, naive(query, ids, documents, k), strict=True)):
        assert keys == [key for _, key in expected]
        assert scores[row].tolist() == [float(score) for score, _ in expected]


@given(problems(), st.integers(-9, 9))
@settings(max_examples=100, deadline=None)
def test_ceiling_equals_filtering_first(problem, below):
    query, ids, documents, edges, k, block = problem
    ceilings = np.array([below + index for index in range(len(query))], dtype=np.float64)
    found, scores = search_exact(query, cut(ids, documents, edges), k, block, below_Q=ceilings)
    for row, (keys, expected) in enumerate(zip(found, naive(query, ids, documents, k, ceilings), strict=True)):
        assert keys == [key for _, key in expected]
        assert scores[row][: len(keys)].tolist() == [float(score) for score, _ in expected]
        assert np.all(np.isneginf(scores[row][len(keys) :]))


@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 64, 384]), st.lists(st.integers(0, 300), max_size=5))
@settings(max_examples=40, deadline=None)
def test_real_vectors_give_equal_bytes_for_any_division(seed, dim, edges):
    """Unit vectors in tight clusters with exact duplicates: fp32 scores around rank k differ by rounding only."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((5, dim))
    documents = centres[generator.integers(5, size=300)] + 1e-6 * generator.standard_normal((300, dim))
    documents[100:140] = documents[:40]
    documents = (documents / np.linalg.norm(documents, axis=1, keepdims=True)).astype(np.float32)
    query = (centres / np.linalg.norm(centres, axis=1, keepdims=True)).astype(np.float32)
    ids = [f"{number:03d}" for number in generator.permutation(300)]
    whole_ids, whole = search_exact(query, [(ids, documents)], 20)
    oracle = pair_scores(np.repeat(query, 300, axis=0), np.tile(documents, (5, 1))).reshape(5, 300)
    for row in range(5):
        expected = sorted(range(300), key=lambda index: (-oracle[row, index], ids[index]))[:20]
        assert whole_ids[row] == [ids[index] for index in expected]
    order = generator.permutation(300)
    again_ids, again = search_exact(query, cut([ids[i] for i in order], documents[order], edges), 20, block=37)
    assert again_ids == whole_ids
    assert again.tobytes() == whole.tobytes()


def test_fp32_alone_would_get_this_wrong():
    """Two documents whose fp32 products tie but whose exact scores differ: rescoring must decide, not the id."""
    query = np.array([[1.0, 2.0**-26]], dtype=np.float32)
    documents = np.array([[1.0, 0.0], [1.0, 1.0]], dtype=np.float32)
    assert (query @ documents.T)[0, 0] == (query @ documents.T)[0, 1]
    found, _ = search_exact(query, [(["a", "b"], documents)], 1)
    assert found == [["b"]]


def test_more_queries_than_a_block_and_fewer_documents_than_k():
    generator = np.random.default_rng(0)
    query = generator.standard_normal((1500, 4)).astype(np.float32)
    documents = generator.standard_normal((3, 4)).astype(np.float32)
    found, scores = search_exact(query, [(["a", "b"], documents[:2]), (["c"], documents[2:])], 10)
    assert scores.shape == (1500, 3)
    assert all(sorted(keys) == ["a", "b", "c"] for keys in found)
    np.testing.assert_allclose(scores, -np.sort(-(query.astype(np.float64) @ documents.T), axis=1), atol=1e-6)


def test_pair_scores_do_not_depend_on_how_many_pairs_there_are():
    generator = np.random.default_rng(1)
    left = generator.standard_normal((9000, 33)).astype(np.float32)
    right = generator.standard_normal((9000, 33)).astype(np.float32)
    whole = pair_scores(left, right)
    single = np.concatenate([pair_scores(left[i : i + 1], right[i : i + 1]) for i in range(0, 9000, 997)])
    assert single.tobytes() == whole[::997].tobytes()
    np.testing.assert_allclose(whole, np.einsum("pd,pd->p", left, right, dtype=np.float64), rtol=1e-12, atol=1e-12)


def test_order_by_score_uses_ids_only_for_ties():
    rows = np.array([0, 0, 0, 1, 1])
    scores = np.array([1.0, 2.0, 2.0, 5.0, 5.0])
    ids = np.array(["a", "c", "b", "z", "y"], dtype=object)
    assert [ids[index] for index in order_by_score(rows, scores, ids)] == ["b", "c", "a", "y", "z"]


def test_not_finite_vectors_are_refused():
    good = np.ones((1, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="id 'x' is not finite"):
        search_exact(good, [(["x"], np.array([[np.nan, 1.0]], dtype=np.float32))], 1)
    with pytest.raises(ValueError, match="query vector"):
        search_exact(good * np.inf, [(["x"], good)], 1)
