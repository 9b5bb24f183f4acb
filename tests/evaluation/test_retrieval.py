"""`evaluate_retrieval`: scores by hand, the models it takes, and what it refuses."""

import numpy as np
import pytest

from nvembed import evaluate_retrieval
from nvembed.retrieval.config import PackageModel
from nvembed.retrieval.encoders import open_encoder
from nvembed.text.instructions import instruction_prefix
from nvembed.types import UserError


class AxisModel:
    """A text is a unit vector along its numbers: `"2 5"` prefers document 2 to document 5. Notes its prompts."""

    dim, max_length, precision, prompts = 8, 16, "fp32", {}

    def __init__(self):
        self.seen = []

    def used_prompt(self, prompt):
        return prompt

    def encode(self, texts, prompts, max_length=None, *, cut_N=None):
        self.seen += list(zip(texts, prompts, strict=True))
        matrix = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in enumerate(texts):
            for rank, column in enumerate(map(int, text.split())):
                matrix[row, column] = 2.0**-rank
        return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


CORPUS = {f"d{i}": str(i) for i in range(8)}
QUERIES = {"first": "1 2 3 4", "third": "5 6 7", "graded": "0 1 2"}
QRELS = {"first": {"d1": 1}, "third": {"d7": 1, "d0": 0}, "graded": {"d0": 1, "d1": 2}}


def test_scores_by_hand():
    model = AxisModel()
    scores = evaluate_retrieval(model, CORPUS, QUERIES, QRELS, instruction="cwe")
    graded = (1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3))
    assert list(scores) == ["ndcg_at_10", "recall_at_100", "mrr_at_10"]
    assert scores["ndcg_at_10"] == pytest.approx((1 + 1 / np.log2(4) + graded) / 3)
    assert scores["mrr_at_10"] == pytest.approx((1 + 1 / 3 + 1) / 3) and scores["recall_at_100"] == 1.0
    prompts = dict(model.seen)
    assert {prompts[text] for text in QUERIES.values()} == {instruction_prefix("cwe")}
    assert {prompts[text] for text in CORPUS.values()} == {""}
    assert evaluate_retrieval(AxisModel(), CORPUS, QUERIES, QRELS, k=1)["ndcg_at_1"] == pytest.approx((1 + 0.5) / 3)


def test_intervals_hold_the_values():
    values = evaluate_retrieval(AxisModel(), CORPUS, QUERIES, QRELS)
    found = evaluate_retrieval(AxisModel(), CORPUS, QUERIES, QRELS, intervals=True)
    assert {metric: row["value"] for metric, row in found.items()} == values
    assert all(row["low"] <= row["value"] <= row["high"] for row in found.values())
    assert found["mrr_at_10"]["low"] < found["mrr_at_10"]["high"]


def test_queries_without_a_relevant_document_are_not_scored():
    qrels = {"first": {"d1": 1}, "third": {"d7": 0}}
    assert evaluate_retrieval(AxisModel(), CORPUS, QUERIES, qrels)["ndcg_at_10"] == 1.0


@pytest.mark.parametrize(
    ("problem", "changes"),
    [
        ("no relevant document", {"qrels": {"first": {"d1": 0}}}),
        ("1 queries that are not given: 'nobody'", {"qrels": {**QRELS, "nobody": {"d1": 1}}}),
        ("1 documents that are not given: 'd9'", {"qrels": {"first": {"d9": 1}}}),
        ("document 'd3' is empty", {"corpus": {**CORPUS, "d3": " "}}),
        ("document 'd3' is empty", {"corpus": {**CORPUS, "d3": {"title": "no text"}}}),
        ("query 'first' is empty", {"queries": {**QUERIES, "first": ""}}),
        ("k is 0", {"k": 0}),
        ("Did you mean 'cwe'", {"instruction": "cew"}),
        ("is a rendered prompt", {"instruction": instruction_prefix("cwe")}),
    ],
)
def test_what_cannot_be_scored_is_refused(problem, changes):
    given = {"corpus": CORPUS, "queries": QUERIES, "qrels": QRELS, **changes}
    with pytest.raises(UserError, match=problem):
        evaluate_retrieval(AxisModel(), **given)


def test_an_off_the_shelf_model():
    corpus = {"sort": "sort a list", "heap": {"title": "Heap", "text": "overflow of the heap"}}
    scores = evaluate_retrieval(PackageModel(), corpus, {"q": "heap overflow"}, {"q": {"heap": 1}})
    assert scores == {"ndcg_at_10": 1.0, "recall_at_100": 1.0, "mrr_at_10": 1.0}
    encoder = open_encoder(PackageModel(), None, "fp32")
    assert evaluate_retrieval(encoder, corpus, {"q": "heap overflow"}, {"q": {"heap": 1}}) == scores
