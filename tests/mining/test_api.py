"""`mine_vectors` against filtering a full sort, query by query."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nvembed.mining
from nvembed import mine_vectors
from nvembed.mining.config import TopKPercPos
from nvembed.mining.rules import cap_documents
from nvembed.retrieval.exact.topk import pair_scores
from nvembed.types import UserError

PERC = {"type": "topk_perc_pos", "max_negative_to_positive_ratio": 0.95}
RULES = [
    ({"type": "topk"}, lambda s, rank, p: True),
    ({"type": "topk_shifted", "shift": 3}, lambda s, rank, p: rank > 3),
    ({"type": "topk_abs", "max_score": 0.4}, lambda s, rank, p: s < 0.4),
    ({"type": "topk_margin_pos", "margin": 0.1}, lambda s, rank, p: s < p - 0.1),
    ({"type": "topk_margin_pos", "margin": 0.0}, lambda s, rank, p: s < p),
    (PERC, lambda s, rank, p: s < p - (1 - 0.95) * abs(p)),
    ({"type": "topk_perc_pos", "max_negative_to_positive_ratio": 0.5}, lambda s, rank, p: s < p - 0.5 * abs(p)),
    ({"type": "rank_window", "first": 2, "last": 9}, lambda s, rank, p: 2 <= rank <= 9),
]


def problem(seed, queries=20, documents=150, dim=16, noise=0.6):
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((documents, dim)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    matrix[-10:] = matrix[:10]  # copies
    positives = [
        generator.choice(documents, size=generator.integers(1, 4), replace=False).tolist() for _ in range(queries)
    ]
    query = matrix[[rows[0] for rows in positives]] + noise * generator.standard_normal((queries, dim)) / dim**0.5
    return query.astype(np.float32), matrix, positives


def naive(query, matrix, positives, count, allows, near=None):
    """Row by row: sort everything, take the first that are allowed."""
    result = []
    for vector, rows in zip(query, positives, strict=True):
        scores = pair_scores(np.tile(vector, (len(matrix), 1)), matrix)
        lowest = min(scores[row] for row in rows)
        chosen = []
        for rank, row in enumerate(sorted(range(len(matrix)), key=lambda row: (-scores[row], row)), start=1):
            copy = any((matrix[row] == matrix[positive]).all() for positive in rows)
            close = near is not None and any(
                pair_scores(matrix[[row]], matrix[[positive]])[0] >= near * 0.9999999 for positive in rows
            )
            if row not in rows and not copy and not close and allows(scores[row], rank, lowest):
                chosen.append(row)
        result.append(chosen[:count] + [-1] * (count - len(chosen)))
    return result


@pytest.mark.parametrize(("rule", "allows"), RULES)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 12))
@settings(max_examples=8)
def test_every_rule_equals_walking_down_a_full_sort(rule, allows, seed, count):
    query, matrix, positives = problem(seed)
    mined = mine_vectors(query, matrix, positives, count, rule)
    assert mined.dtype == np.int64 and mined.shape == (len(query), count)
    assert mined.tolist() == naive(query, matrix, positives, count, allows)


def test_a_rule_is_its_config_or_its_keys():
    query, matrix, positives = problem(8)
    mined = mine_vectors(query, matrix, positives, 5, PERC).tolist()
    assert mine_vectors(query, matrix, positives, 5, TopKPercPos()).tolist() == mined
    for other in ({**PERC, "type": "topk_percpos"}, {"type": "topk_margin_pos", "margin_to_positive": 0.1}, {}):
        with pytest.raises(UserError, match=r"rule \{"):
            mine_vectors(query, matrix, positives, 5, other)


def test_scores_of_any_sign_and_few_documents():
    query, matrix, positives = problem(3, documents=30)
    mined = mine_vectors(-query, matrix, positives, 30, PERC)  # the positive is among the worst
    assert mined.tolist() == naive(-query, matrix, positives, 30, RULES[5][1])
    assert (mined == -1).any()
    one = np.ones((1, 2), dtype=np.float32)
    assert mine_vectors(one, one, [[0]], 2, PERC).tolist() == [[-1, -1]]
    assert mine_vectors(one[:0], one, [], 2, PERC).shape == (0, 2)


def test_documents_too_similar_to_a_positive_are_refused_and_others_take_their_place():
    query, matrix, positives = problem(4, documents=400)
    matrix[200:300] = matrix[:100] + 0.02 * np.random.default_rng(0).standard_normal((100, 16))
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    for rule, allows in (RULES[0], RULES[2]):
        expected = naive(query, matrix, positives, 6, allows, near=0.99)
        assert mine_vectors(query, matrix, positives, 6, rule, max_similarity_to_positive=0.99).tolist() == expected
        if rule["type"] == "topk":  # below 0.4 there is no near duplicate of a positive
            assert mine_vectors(query, matrix, positives, 6, rule).tolist() != expected


def test_the_cap_holds_and_equals_the_cap_on_whole_rankings():
    query, matrix, positives = problem(5, queries=60, documents=80)
    mined = mine_vectors(query, matrix, positives, 5, {"type": "topk_abs", "max_score": 0.9}, max_per_document=4)
    counts = np.unique(mined[mined >= 0], return_counts=True)[1]
    assert counts.max() == 4
    whole = np.array(naive(query, matrix, positives, 80, lambda s, rank, p: s < 0.9))
    scores = np.where(
        whole >= 0, pair_scores(np.repeat(query, 80, axis=0), matrix[whole.reshape(-1)]).reshape(whole.shape), -np.inf
    )
    columns = cap_documents(whole, scores, 5, 4)
    expected = np.where(columns >= 0, np.take_along_axis(whole, np.maximum(columns, 0), axis=1), -1)
    assert mined.tolist() == expected.tolist()


def test_draws_repeat_for_a_seed_and_stay_in_their_pool():
    query, matrix, positives = problem(6)
    rule = {"type": "sampled_topk", "top": 8, "ceiling": {"type": "topk_abs", "max_score": 0.5}}
    pool = naive(query, matrix, positives, 8, lambda s, rank, p: s < 0.5)
    first = mine_vectors(query, matrix, positives, 3, rule, seed=1)
    assert all(
        set(row) <= set(best) and row == sorted(row, key=best.index)
        for row, best in zip(first.tolist(), pool, strict=True)
    )
    assert first.tolist() == mine_vectors(query, matrix, positives, 3, rule, seed=1).tolist()
    assert first.tolist() != mine_vectors(query, matrix, positives, 3, rule, seed=2).tolist()
    assert first[:7].tolist() == mine_vectors(query[:7], matrix, positives[:7], 3, rule, seed=1).tolist()
    random = mine_vectors(query, matrix, positives, 6, {"type": "random"}, seed=1)
    for row, known in zip(random.tolist(), positives, strict=True):
        assert len(set(row)) == 6 and not any((matrix[item] == matrix[known]).all(axis=1).any() for item in row)


def test_what_is_wrong_is_named():
    query, matrix, positives = problem(7)
    cases = [
        ((query, matrix, positives, 3, {"type": "topk_perc"}), "topk_perc_pos"),
        ((query, matrix, positives, 3, {"type": "topk_perc_pos", "ratio": 0.9}), "ratio"),
        ((query, matrix, positives, 0, PERC), "num_negatives is 0"),
        ((query, matrix, positives[:-1], 3, PERC), "19 lists of positives for 20 queries"),
        ((query, matrix, [[150], *positives[1:]], 3, PERC), "query 0 names document 150"),
        ((query, matrix, [[], *positives[1:]], 3, PERC), "query 0 has no positive"),
        ((query, matrix[:, :3], positives, 3, PERC), "documents have shape"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            mine_vectors(*arguments)
    with pytest.raises(UserError, match="draws them"):
        mine_vectors(query, matrix, positives, 3, {"type": "random"}, max_per_document=2)
    assert mine_vectors(query, matrix, [[], *positives[1:]], 3, {"type": "topk"}).shape == (20, 3)
    with pytest.raises(AttributeError, match="no attribute 'mine'"):
        nvembed.mining.mine  # noqa: B018


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_named(value):
    rng = np.random.default_rng(0)
    queries, documents = (rng.normal(size=(count, 8)).astype(np.float32) for count in (5, 40))
    rule = {"type": "topk_perc_pos", "max_negative_to_positive_ratio": 0.95}
    for matrix, row, message in (
        (queries, 2, r"queries\[2\] holds NaN, infinity"),
        (documents, 3, "query 3 or its positive, document 3, is not finite"),
        (documents, 30, "the document vector with id 30 is not finite"),
    ):
        before = matrix[row, 3]
        matrix[row, 3] = value
        with pytest.raises(UserError, match=message):
            mine_vectors(queries, documents, [[number] for number in range(5)], 3, rule)
        matrix[row, 3] = before
