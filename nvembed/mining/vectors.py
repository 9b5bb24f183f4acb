"""Hard negatives for plain arrays of vectors: search, rule, selection, without recipe, files or Ray.

Shapes: Q queries, N documents, D dimensions, C candidates of a query, K negatives wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from nvembed.mining.config import RandomNegatives, RankWindow, RuleConfig, SampledTopK, SearchedRule, TopKShifted
from nvembed.mining.rules import FREE, cap_documents, drawn, eligible, first_allowed, mix, rule_limits
from nvembed.retrieval.search import as_matrix, numbered, search_shards
from nvembed.retrieval.search_merge import Best, gathered_scores
from nvembed.types import UserError

# The names that other tools and papers use, and ours
_TYPES = {
    "topk_percpos": "topk_perc_pos",
    "topk_marginpos": "topk_margin_pos",
}
_KEYS = {
    ("topk_perc_pos", "max_negative_to_positive_ratio"): "share",
    ("topk_margin_pos", "margin_to_positive"): "margin",
}


def read_rule(rule: Mapping[str, Any]) -> RuleConfig:
    """The rule a mapping describes: the recipe's keys, or the longer names of `mine_vectors`.

    Raises:
        UserError: an unknown type or key, a value out of range.
    """
    kind = str(rule.get("type", ""))
    kind = _TYPES.get(kind, kind)
    keys = {_KEYS.get((kind, key), key): value for key, value in rule.items()}
    adapter: TypeAdapter[RuleConfig] = TypeAdapter(RuleConfig)
    try:
        return adapter.validate_python({**keys, "type": kind})
    except ValidationError as error:
        said = "; ".join(".".join(map(str, item["loc"])) + f": {item['msg']}" for item in error.errors())
        raise UserError(f"rule {dict(rule)!r}: {said}") from error


def mine_vectors(
    queries: np.ndarray,
    documents: np.ndarray,
    positives: Sequence[Sequence[int]],
    num_negatives: int,
    rule: Mapping[str, Any],
    *,
    near_duplicate: float | None = None,
    max_per_document: int | None = None,
    seed: int = 0,
    precision: str = "auto",
    device: str = "cpu",
) -> np.ndarray:
    """Hard negatives of every query, by exact search: the best documents that the rule allows.

    The rule's ceiling is applied before the top k is taken, so a query gets its negatives however deep its positive
    ranks. Known positives are never negatives, nor are documents with exactly a positive's vector.

    Args:
        queries: float [Q, D]; used as float32.
        documents: float [N, D], a memory-mapped array included.
        positives: for each query the row numbers of its documents, one at least.
        num_negatives: K, wanted per query.
        rule: what may be a negative of a query with lowest positive score p:
            {"type": "topk"}: any; {"type": "topk_shifted", "shift": 10}: ranks behind the tenth;
            {"type": "topk_abs", "max_score": 0.7}: s < 0.7;
            {"type": "topk_marginpos", "margin": 0.05}: s < p - 0.05;
            {"type": "topk_percpos", "max_negative_to_positive_ratio": 0.95}: s < p - 0.05 |p|;
            {"type": "rank_window", "first": 30, "last": 100}: those ranks, positives counted;
            {"type": "sampled_topk", "top": 10, "temperature": 0.1, "ceiling": {...}}: a draw from the best ten under a
            ceiling; {"type": "random"}: a uniform draw.
        near_duplicate: refuse documents whose cosine with a positive of the query is at least this.
        max_per_document: a document is a negative of this many queries at most; see `rules.cap_documents`.
        seed: of the draws. A query's draw depends on its row number and the seed only.
        precision, device: see `search_vectors`; they never change the result.

    Returns:
        int64 [Q, K] row numbers of documents, best first (draws: best of the drawn first; random: in drawn order), -1
        where fewer qualify.

    Raises:
        UserError: a rule that is not known, shapes that do not fit, a query without a positive, a row number that no
            document has.

    Source: NV-Retriever (arXiv 2407.15831), section 3.
    """
    query_QD = as_matrix(queries, "queries")
    known = _Known(query_QD, documents, positives)
    chosen = read_rule(rule)
    if num_negatives < 1:
        raise UserError(f"num_negatives is {num_negatives}; at least one negative per query is needed")
    options = {"precision": precision, "device": device}
    if isinstance(chosen, RandomNegatives):
        return _random(known, num_negatives, seed, near_duplicate, max_per_document)
    limits = rule_limits(chosen, known.lowest_Q)
    wanted = chosen.top if isinstance(chosen, SampledTopK) else num_negatives
    first, ranked = limits.first, isinstance(chosen, TopKShifted | RankWindow)
    depth = (limits.last or first - 1 + 2 * wanted) if ranked else wanted + min(wanted, 16)
    if max_per_document is not None:
        depth = max(depth, 4 * wanted + 64)
    out_QK = np.full((len(query_QD), num_negatives), FREE, dtype=np.int64)
    left = np.arange(len(query_QD))
    pool: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while len(left):
        depth = min(depth + known.most(left), len(documents))
        best = _search(query_QD[left], documents, depth, None if ranked else limits.ceiling_Q[left], options)
        allowed_QC = eligible(
            best.scores_QK,
            np.broadcast_to(np.arange(1, depth + 1), best.scores_QK.shape),
            type(limits)(limits.ceiling_Q[left], limits.first, limits.last),
            known.excluded(left, best, near_duplicate),
        )
        exhausted_Q = ~np.isfinite(best.scores_QK[:, -1]) | (depth >= (limits.last or len(documents)))
        done = exhausted_Q | (allowed_QC.sum(axis=1) >= wanted) | (max_per_document is not None)
        columns_QK = _choose(chosen, allowed_QC, best, num_negatives, seed, left)
        if max_per_document is None:
            picked_QK = np.take_along_axis(best.ids_QK, np.maximum(columns_QK, 0), axis=1)
            out_QK[left[done]] = np.where(columns_QK == FREE, FREE, picked_QK)[done]
        else:
            pool.append((left, np.where(allowed_QC, best.ids_QK, FREE), best.scores_QK))
        left = left[~done]
        depth *= 4
    return out_QK
