"""Retrieval metrics of a model on queries, a corpus and judgements in memory; no recipe, no Ray.

Shapes: Q queries, N documents, D width.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nvembed.core.arguments import check_count, check_flag, check_mapping, public, shown
from nvembed.core.messages import nearest
from nvembed.data.tables import document_text
from nvembed.evaluation.metrics import RECALL_DEPTH, retrieval_values
from nvembed.evaluation.significance import bootstrap, mean_statistic
from nvembed.retrieval.encode_list import encode_texts
from nvembed.retrieval.encoders import Encoder, Model, encoder_of
from nvembed.retrieval.exact.search import search_exact
from nvembed.text.identity import refuse_texts, text_problem
from nvembed.text.instructions import choose_prompts
from nvembed.types import UserError

if TYPE_CHECKING:
    from nvembed.modeling.embedder import Embedder

_SAMPLES, _SEED = 1000, 0  # of the bootstrap, as `EvaluateConfig` has them
_LISTED = 5


@public
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
        UserError: something else than mappings of ids; a text that cannot be embedded, a judgement of an unknown query
            or document, a grade that is no number, an unknown key or precision, a wrong model or count.

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
    k, intervals = check_count("k", k), check_flag("intervals", intervals)
    if instruction is not None and not isinstance(instruction, str):
        raise UserError(f"instruction is {shown(instruction)}; give one task sentence or its key, or None for none.")
    documents, gains = _checked(corpus, queries, qrels)
    choose_prompts(1, instruction or "")  # an unknown key, before the model is loaded
    encoder = encoder_of(model, with_prompt=instruction is not None, precision=precision)
    query_QD = encode_texts([queries[key] for key in gains], encoder, instruction=instruction or "")
    document_ND = encode_texts(list(documents.values()), encoder)
    ranked, _ = search_exact(query_QD, [(list(documents), document_ND)], max(min(k, len(documents)), RECALL_DEPTH))
    values = retrieval_values(ranked, list(gains.values()), k)
    scores = {
        metric: bootstrap(mean_statistic(np.array(row)), len(row), _SAMPLES if intervals else 1, _SEED)
        for metric, row in values.items()
    }
    return dict(scores) if intervals else {metric: interval["value"] for metric, interval in scores.items()}


def _checked(
    corpus: Mapping[str, Any], queries: Mapping[str, str], qrels: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """The texts of the documents and the grades of the scored queries.

    Raises:
        UserError: see `evaluate_retrieval`.
    """
    for name, mapping, kind in (("corpus", corpus, "document"), ("queries", queries, "query")):
        check_mapping(name, mapping, f"Give {kind} id -> text, such as dict(zip(ids, texts)).")
        _check_ids(name, mapping)
    _check_rows(corpus)
    documents = {key: _document(row) for key, row in corpus.items()}
    gains = _gains(queries, documents, _grades(qrels))
    _check_texts("document", documents)
    _check_texts("query", {key: queries[key] for key in gains})
    return documents, gains


def _check_ids(name: str, mapping: Mapping[Any, Any]) -> None:
    kinds = {next((kind for kind in (str, int, np.integer) if isinstance(key, kind)), type(key)) for key in mapping}
    if len(kinds) > 1 or kinds & {tuple, type(None)}:
        wrong = next(key for key in mapping if not isinstance(key, str))
        raise UserError(f"{name} has the id {shown(wrong)}; give strings as ids.")


def _check_rows(corpus: Mapping[str, Any]) -> None:
    """Refuse rows of a document that are neither a text nor have one."""
    problems = {}
    for key, row in corpus.items():
        if not isinstance(row, Mapping):
            continue
        if row.get("text") is None:
            keys = ", ".join(map(str, row)) or "none"
            problems[f"document {key!r}"] = f'is empty: it has no "text" (its keys: {keys})'
        for part in ("title", "text"):
            if row.get(part) is not None and not isinstance(row[part], str):
                problems[f"document {key!r}"] = f"has a {part} that is {type(row[part]).__name__}, not a text"
    refuse_texts("evaluate_retrieval", problems)


def _grades(qrels: Any) -> Mapping[str, Mapping[str, float]]:
    """The judgements, all of them finite numbers."""
    advice = 'Give query id -> {document id: grade}, such as {"q1": {"d7": 1}}.'
    check_mapping("qrels", qrels, advice)
    for query, grades in qrels.items():
        check_mapping(f"qrels[{query!r}]", grades, advice)
        for document, grade in grades.items():
            if not isinstance(grade, numbers.Real) or not math.isfinite(grade):
                raise UserError(f"qrels[{query!r}][{document!r}] is {shown(grade)}; give a finite number.")
    return qrels


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
        if unknown := sorted(names - known.keys(), key=lambda name: (str(name), repr(name))):
            listed = ", ".join(map(repr, unknown[:_LISTED]))
            as_text = {str(name): name for name in known}
            if (first := str(unknown[0])) in as_text:
                hint = f" There is {as_text[first]!r}: use one type of id."
            else:
                hint = nearest(first, list(as_text))
            raise UserError(
                f"qrels name {len(unknown)} {kind} that are not given: {listed}.{hint} Remove them or add them."
            )
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
    refuse_texts("evaluate_retrieval", {f"{kind} {key!r}": problem for key, problem in problems.items()})
