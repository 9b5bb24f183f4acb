"""Metrics against scikit-learn, SciPy and worked examples; properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score, v_measure_score
from sklearn.neighbors import KNeighborsClassifier

from nvembed.evaluation.metrics import contingency, knn_labels, ndcg, recall, reciprocal_rank, spearman, v_measure, vote

IDS = [f"d{index:02d}" for index in range(30)]
judged = st.dictionaries(st.sampled_from(IDS), st.sampled_from([1.0, 2.0, 3.0]), min_size=1)
rankings = st.permutations(IDS)


def test_ndcg_of_a_worked_example() -> None:
    # gains 3, 0, 1 at ranks 1, 2, 3; ideal 3, 2, 1
    found = ndcg(["a", "x", "c"], {"a": 3.0, "b": 2.0, "c": 1.0})
    assert found == pytest.approx((3 + 1 / 2) / (3 + 2 / np.log2(3) + 1 / 2))
    assert ndcg(["x", "a"], {"a": 1.0}) == pytest.approx(1 / np.log2(3))


def test_ndcg_counts_what_lies_beyond_the_cut_in_the_ideal_only() -> None:
    ranked = [*IDS[1:11], IDS[0]]
    assert ndcg(ranked, {IDS[0]: 1.0}) == 0.0
    assert ndcg(IDS, dict.fromkeys(IDS[:20], 1.0)) == pytest.approx(1.0)  # ten are all one can have


@settings(deadline=None)
@given(rankings, judged)
def test_ndcg_is_that_of_scikit_learn(ranked: list[str], gains: dict[str, float]) -> None:
    truth = [[gains.get(key, 0.0) for key in IDS]]
    scores = [[-float(ranked.index(key)) for key in IDS]]
    assert ndcg(ranked, gains) == pytest.approx(ndcg_score(truth, scores, k=10), abs=1e-12)


@settings(deadline=None)
@given(rankings, judged, st.integers(0, 28))
def test_moving_a_better_document_up_never_lowers_ndcg(ranked: list[str], gains: dict[str, float], place: int) -> None:
    first, second = ranked[place], ranked[place + 1]
    swapped = [*ranked[:place], second, first, *ranked[place + 2 :]]
    if gains.get(second, 0.0) >= gains.get(first, 0.0):
        assert ndcg(swapped, gains) >= ndcg(ranked, gains) - 1e-12


@settings(deadline=None)
@given(rankings, judged, st.integers(1, 30))
def test_recall_and_reciprocal_rank(ranked: list[str], gains: dict[str, float], k: int) -> None:
    relevant = set(gains)
    found = recall(ranked, relevant, k)
    assert found == pytest.approx(sum(key in relevant for key in ranked[:k]) / len(relevant))
    assert recall(ranked, relevant, k) <= recall(ranked, relevant, 30) == 1.0
    best = min(ranked.index(key) for key in relevant) + 1
    assert reciprocal_rank(ranked, relevant, k) == (1 / best if best <= k else 0.0)


def test_a_query_without_a_relevant_document_is_refused() -> None:
    with pytest.raises(ValueError, match="relevant"):
        ndcg(["a"], {})
    with pytest.raises(ValueError, match="relevant"):
        recall(["a"], set())


def test_vote_settles_ties_by_score_then_by_name() -> None:
    assert vote(["a", "b", "b"], [0.9, 0.1, 0.1]) == "b"
    assert vote(["a", "b"], [0.1, 0.9]) == "b"
    assert vote(["b", "a"], [0.5, 0.5]) == "a"
    assert vote([], []) is None


def test_knn_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(1500, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = [f"c{value}" for value in generator.integers(0, 2, 300)]  # two classes, odd k: no ties to settle
    reference = KNeighborsClassifier(n_neighbors=5, metric="cosine").fit(vectors[:300], labels)
    assert knn_labels(vectors[300:], vectors[:300], labels, 5) == reference.predict(vectors[300:]).tolist()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=40))
def test_v_measure_is_that_of_scikit_learn(rows: list[tuple[int, int]]) -> None:
    label_N, cluster_N = np.array(rows).T
    found = v_measure(contingency(label_N, cluster_N)[None])[0]
    assert found == pytest.approx(v_measure_score(label_N, cluster_N), abs=1e-9)
    assert 0.0 <= found <= 1.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=40))
def test_spearman_is_that_of_scipy(rows: list[tuple[int, int]]) -> None:
    a_N, b_N = np.array(rows, dtype=np.float64).T
    found = spearman(a_N[None], b_N[None])[0]
    constant = np.ptp(a_N) == 0 or np.ptp(b_N) == 0
    assert found == (0.0 if constant else pytest.approx(spearmanr(a_N, b_N).statistic, abs=1e-9))
    assert spearman(np.exp(a_N)[None], b_N[None])[0] == pytest.approx(found, abs=1e-12)  # ranks only
