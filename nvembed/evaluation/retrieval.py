"""Retrieval metrics of a model on queries, a corpus and judgements in memory; no recipe, no Ray.

Shapes: Q queries, N documents, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nvembed.data.tables import document_text
from nvembed.evaluation.metrics import RECALL_DEPTH, retrieval_values
from nvembed.evaluation.significance import bootstrap, mean_statistic
from nvembed.retrieval.encode import encode_texts, encoder_of
from nvembed.retrieval.encoders import Encoder, Model
from nvembed.retrieval.exact.search import search_exact
from nvembed.text.identity import text_problem
from nvembed.types import UserError

if TYPE_CHECKING:
    from nvembed.modeling.embedder import Embedder

_SAMPLES, _SEED = 1000, 0  # of the bootstrap, as `EvaluateConfig` has them
_LISTED = 5


def evaluate_retrieval(
    model: Model | Encoder | Embedder,
    corpus: Mapping[str, str | Mapping[str, str]],
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, float]],
    *,
    instruction: str | None = None,
    k: int = 10,
    precision: str = "fp32",
    intervals: bool = False,
) -> dict[str, Any]:
    """Score a model on a retrieval task: exact search of every query in the whole corpus.

    Args:
        model: see `encode_texts`.
        corpus: document id -> text, or `{"title": ..., "text": ...}`, which is embedded as "title text".
        queries: query id -> text.
        qrels: query id -> {document id: grade}; a grade of 0 is not relevant. Queries without a relevant document are
            not scored, as in trec_eval.
        instruction: task sentence of the queries or its key in `text.instructions.CATALOGUE`; None for none. Documents
            carry none.
        k: ranks that nDCG and MRR count; recall counts 100.
        precision: "fp32", "bf16" or "auto"; of an encoder its own.
        intervals: return 95 % bootstrap intervals over queries (1,000 draws) besides the values.

    Returns:
        `ndcg_at_<k>` (linear gains, as in trec_eval), `recall_at_100` and `mrr_at_<k>`, each 0 to 1, the mean over the
        scored queries; with `intervals` each `{"value": ..., "low": ..., "high": ...}`.

    Raises:
        UserError: a text that cannot be embedded, a judgement of an unknown query or document, an unknown key, ...

    Example:
        >>> from nvembed import evaluate_retrieval
        >>> from nvembed.retrieval.config import PackageModel  # a small model inside an installed package
        >>> corpus = {
        ...     "a": "sorted() returns a new list in ascending order.",
        ...     "b": {"title": "Buffer overflow", "text": "A write past the end of a buffer."},
        ... }
        >>> queries = {"q1": "memory is written out of bounds", "q2": "how do I sort a list?"}
        >>> evaluate_retrieval(PackageModel(), corpus, queries, {"q1": {"b": 1}, "q2": {"a": 1}})
        {'ndcg_at_10': 1.0, 'recall_at_100': 1.0, 'mrr_at_10': 1.0}
    """
    if k < 1:
        raise UserError(f"k is {k}; at least one rank has to count.")
    documents = {key: _document(row) for key, row in corpus.items()}
    gains = _gains(queries, documents, qrels)
    _check_texts("document", documents)
    _check_texts("query", {key: queries[key] for key in gains})
    encoder = encoder_of(model, with_prompt=instruction is not None, precision=precision)
    query_QD = encode_texts([queries[key] for key in gains], encoder, instruction=instruction or "")
    document_ND = encode_texts(list(documents.values()), encoder)
    ranked, _ = search_exact(query_QD, [(list(documents), document_ND)], max(k, RECALL_DEPTH))
    values = retrieval_values(ranked, list(gains.values()), k)
    scores = {
        metric: bootstrap(mean_statistic(np.array(row)), len(row), _SAMPLES if intervals else 1, _SEED)
        for metric, row in values.items()
    }
    return dict(scores) if intervals else {metric: interval["value"] for metric, interval in scores.items()}


def _document(row: str | Mapping[str, str]) -> str:
    if isinstance(row, Mapping) and isinstance(row.get("text"), str):
        return document_text(row.get("title") or "", row["text"])
    return "" if isinstance(row, Mapping) else row


def _gains(
    queries: Mapping[str, str], documents: Mapping[str, str], qrels: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """The grades above 0 of each query that has any."""
    judged_documents = {document for grades in qrels.values() for document in grades}
    for kind, known, names in (("queries", queries, set(qrels)), ("documents", documents, judged_documents)):
        if unknown := sorted(names - known.keys()):
            listed = ", ".join(map(repr, unknown[:_LISTED]))
            raise UserError(f"qrels name {len(unknown)} {kind} that are not given: {listed}. Remove them or add them.")
    relevant = {
        query: {document: float(grade) for document, grade in grades.items() if grade > 0}
        for query, grades in qrels.items()
    }
    scored = {query: grades for query, grades in relevant.items() if grades}
    if not scored:
        raise UserError("qrels name no relevant document (a grade above 0); nothing can be scored.")
    return scored


def _check_texts(kind: str, texts: Mapping[str, str]) -> None:
    problems = {key: problem for key, text in texts.items() if (problem := text_problem(text)) is not None}
    if problems:
        listed = "; ".join(f"{kind} {key!r} {problem}" for key, problem in list(problems.items())[:_LISTED])
        raise UserError(f"{len(problems)} texts cannot be embedded: {listed}. Correct or remove them.")
