"""Hard negatives for plain arrays of vectors: search, rule, selection, without recipe, files or Ray.

Shapes: Q queries, N documents, D dimensions, C candidates of a query, K negatives wanted, P pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from nvembed.core.arguments import check_count, check_list, check_number, check_optional_count, public, shown
from nvembed.core.messages import nearest
from nvembed.core.validation import describe_error, tagged_models
from nvembed.mining.config import (
    RandomNegatives,
    RankWindow,
    RuleConfig,
    SampledTopK,
    SearchedRule,
    TopKMarginPos,
    TopKPercPos,
    TopKShifted,
)
from nvembed.mining.lists import owners, padded, starts
from nvembed.mining.rules import (
    ABSENT,
    Limits,
    cap_documents,
    draw_accepted,
    draw_sampled,
    example_generator,
    first_allowed,
    mix,
    picked,
    rule_limits,
)
from nvembed.mining.selection import CODE, Block, Reason, decide
from nvembed.retrieval.exact.search import (
    as_array,
    as_matrix,
    check_results,
    choose_precision,
    numbered,
    search_shards,
)
from nvembed.retrieval.exact.topk import Best, gathered_scores, pair_scores
from nvembed.types import UserError

_RULES: TypeAdapter[RuleConfig] = TypeAdapter(RuleConfig)


@public
def mine_vectors(
    queries: np.ndarray | Sequence[Sequence[float]],
    documents: np.ndarray | Sequence[Sequence[float]],
    positives: Sequence[Sequence[int]],
    num_negatives: int,
    rule: Mapping[str, Any] | RuleConfig,
    *,
    max_similarity_to_positive: float | None = None,
    max_per_document: int | None = None,
    seed: int = 0,
    precision: str = "auto",
    device: str = "cpu",
) -> np.ndarray:
    """Hard negatives of every query, by exact search: the best documents that the rule allows.

    The rule's ceiling is applied before the top k is taken, so a query gets its negatives however deep its positive
    ranks. Known positives are never negatives, nor are documents with exactly a positive's vector.

    Args:
        queries: numbers [Q, D], as `search_vectors` takes them; used as float32.
        documents: numbers [N, D], a memory-mapped array included.
        positives: for each query the row numbers of its documents, one at least.
        num_negatives: K, wanted per query.
        rule: a rule of `nvembed.mining.config`, or its keys as in a recipe; with p the lowest positive's score:
            {"type": "topk"}: any; {"type": "topk_shifted", "shift": 10}: ranks behind the tenth;
            {"type": "topk_abs", "max_score": 0.7}: s < 0.7; {"type": "topk_margin_pos", "margin": 0.05}: s < p - 0.05;
            {"type": "topk_perc_pos", "max_negative_to_positive_ratio": 0.95}: s < p - 0.05 |p|;
            {"type": "rank_window", "first": 30, "last": 100}: those ranks, positives counted;
            {"type": "sampled_topk", "top": 10, "temperature": 0.1, "ceiling": {...}}: a draw from the best ten under a
            ceiling; {"type": "random"}: a uniform draw.
        max_similarity_to_positive: refuse documents whose cosine with a positive of the query is at least this.
        max_per_document: a document is a negative of this many queries at most; see `rules.cap_documents`.
        seed: of the draws. A query's draw depends on its row number and the seed only.
        precision, device: see `search_vectors`; they never change the result.

    Returns:
        int64 [Q, K] row numbers of documents, best first (random: in drawn order), -1 where fewer qualify.

    Raises:
        UserError: an unknown rule (all that is wrong with it), wrong shapes, a query without a positive or with one
            that is no row, a count or similarity out of range, NaN, infinity, an unknown precision or device.

    Example:
        >>> import numpy as np; from nvembed import mine_vectors
        >>> vectors = np.eye(4, dtype=np.float32) + 0.1 * np.arange(4, dtype=np.float32)
        >>> mine_vectors(vectors, vectors, [[0], [1], [2], [3]], 1, {"type": "topk"}).tolist()
        [[3], [3], [3], [2]]

    Source: NV-Retriever (arXiv 2407.15831), section 3.
    """
    query_QD, document_ND = as_matrix(queries, "queries"), as_array(documents, "documents")
    config = _read_rule(rule, len(document_ND))
    num_negatives = check_results("num_negatives", num_negatives, len(query_QD))
    max_per_document, seed = _checked_options(config, max_similarity_to_positive, max_per_document, seed)
    choose_precision(precision, device)
    known = _Positives(query_QD, document_ND, _row_lists(positives), max_similarity_to_positive)
    if isinstance(config, RandomNegatives):
        return _random(known, num_negatives, seed)
    mining = _Mining(known, config, rule_limits(config, known.lowest(config)), num_negatives, seed, precision, device)
    return mining.run() if max_per_document is None else mining.run_capped(max_per_document)


def _checked_options(rule: RuleConfig, max_similarity: Any, cap: Any, seed: Any) -> tuple[int | None, int]:
    """The cap on documents and the seed.

    Raises:
        UserError: one of them is out of range, or the rule takes no cap.
    """
    cap = check_optional_count("max_per_document", cap)
    if max_similarity is not None:
        check_number("max_similarity_to_positive", max_similarity, -1, 1)
    if isinstance(rule, RandomNegatives | SampledTopK) and cap is not None:
        raise UserError(f"max_per_document needs candidates in order of preference; {rule.type} draws them")
    return cap, check_count("seed", seed, least=None, most=None)


def _read_rule(rule: Mapping[str, Any] | RuleConfig, documents: int) -> RuleConfig:
    """The rule that a mapping describes; `top` is no more than there are documents.

    Raises:
        UserError: an unknown type or key, a value out of range.
    """
    rules = tagged_models(RuleConfig)
    if not isinstance(rule, (Mapping, *rules.values())):
        hint = nearest(rule, list(rules)) if isinstance(rule, str) else ""
        raise UserError(f'rule is {shown(rule)}; give its keys: {{"type": ...}}, one of {", ".join(rules)}.{hint}')
    given = {str(key): value for key, value in rule.items()} if isinstance(rule, Mapping) else rule
    problems: list[str] = []
    try:
        config = _RULES.validate_python(given)
    except ValidationError as error:
        for detail in error.errors():
            path, message, _ = describe_error(detail, (), RuleConfig, lambda path: _at(given, path))
            problems.append(f"{'.'.join(map(str, ('rule', *path)))}: {message}")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError("\n  ".join([f"rule {shown(rule)}: {count}", *problems]))
    if isinstance(config, SampledTopK):
        return config.model_copy(update={"top": min(config.top, max(documents, 1))})
    return config


def _at(value: Any, path: Sequence[str | int]) -> Any:
    """The value at a path below a mapping; None where there is none."""
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _row_lists(positives: Any) -> list[Sequence[int]]:
    """Each query's row numbers.

    Raises:
        UserError: not a list of lists of whole numbers; a mask is none.
    """
    whole = getattr(positives, "ndim", 1) == 2 and not hasattr(positives, "columns")
    lists = list(np.asarray(positives)) if whole else check_list("positives", positives, "lists of row numbers")
    for query, rows in enumerate(lists):
        if isinstance(rows, str | bytes | Mapping) or not hasattr(rows, "__len__") or not hasattr(rows, "__iter__"):
            raise UserError(f"positives[{query}] is {shown(rows)}, not a list of row numbers such as [0, 4].")
        items = np.asarray(rows).ravel().tolist() if hasattr(rows, "__array__") else rows
        for row in items:
            if isinstance(row, bool) or not isinstance(row, int | np.integer) or not -(2**63) <= row < 2**63:
                mask = " Of a mask give np.flatnonzero(mask)." if isinstance(row, bool | np.bool_) else ""
                raise UserError(f"positives[{query}] holds {shown(row)}; give row numbers of documents.{mask}")
    return lists


class _Positives:
    """The positives of each query and their scores.

    Attributes:
        most: positives of the query that has most.
        rows_QM, scores_QM: row numbers (`ABSENT` behind the last) and float64 scores.
        lowest_Q: float64, the lowest of each query's scores; +inf without a positive.
    """

    def __init__(
        self,
        query_QD: np.ndarray,
        documents: np.ndarray,
        positives: Sequence[Sequence[int]],
        max_similarity: float | None,
    ) -> None:
        if documents.ndim != 2 or documents.shape[1] != query_QD.shape[1]:
            shapes = f"documents have shape {documents.shape}, queries {query_QD.shape}"
            raise UserError(f"{shapes}: both need the same width. Embed them with one model.")
        if len(positives) != len(query_QD):
            raise UserError(f"{len(positives)} lists of positives for {len(query_QD)} queries; give one for each.")
        self.query_QD, self.documents, self.max_similarity = query_QD, documents, max_similarity
        count_Q = np.fromiter(map(len, positives), dtype=np.int64, count=len(positives))
        start_Q = starts(count_Q)
        owner_P = owners(start_Q)
        row_P = np.fromiter(itertools.chain.from_iterable(positives), dtype=np.int64, count=len(owner_P))
        outside = np.flatnonzero((row_P < 0) | (row_P >= len(documents)))
        if len(outside):
            bad = int(outside[0])
            raise UserError(f"query {owner_P[bad]} names document {row_P[bad]}; rows are 0 to {len(documents) - 1}")
        unique, place_P = np.unique(row_P, return_inverse=True)
        vectors_UD = np.asarray(documents[unique], dtype=np.float32)
        score_P = gathered_scores(query_QD, owner_P, vectors_UD, place_P)
        if not np.isfinite(score_P).all():
            bad = int(np.argmin(np.isfinite(score_P)))
            raise UserError(f"query {owner_P[bad]} or its positive, document {row_P[bad]}, is not finite; correct it.")
        self.rows_QM, self.scores_QM = padded(start_Q, row_P, ABSENT), padded(start_Q, score_P, np.nan)
        self.most = self.rows_QM.shape[1]
        self.lowest_Q = padded(start_Q, score_P, np.inf).min(axis=1, initial=np.inf)

    def lowest(self, rule: SearchedRule) -> np.ndarray:
        """float64 [Q], the lowest score among each query's positives.

        Raises:
            UserError: the rule needs it and a query has no positive.
        """
        inner = rule.ceiling if isinstance(rule, SampledTopK) else rule
        without = np.flatnonzero(np.isposinf(self.lowest_Q))
        if len(without) and isinstance(inner, TopKPercPos | TopKMarginPos):
            raise UserError(f"query {without[0]} has no positive; {inner.type} measures negatives against one")
        return self.lowest_Q

    def never(self, queries_q: np.ndarray, rows_qC: np.ndarray, scores_qC: np.ndarray) -> np.ndarray:
        """bool [q, C]: candidates that are positives of the query or have the vector of one."""
        out_qC = np.zeros(rows_qC.shape, dtype=bool)
        for column in range(self.most):
            positive_q1 = self.rows_QM[queries_q, column, None]
            out_qC |= (rows_qC == positive_q1) & (positive_q1 != ABSENT)
            if self.max_similarity is None:  # else `too_similar` refuses copies
                same_qC = (scores_qC == self.scores_QM[queries_q, column, None]) & ~out_qC  # to the bit
                at_P, candidate_P = np.nonzero(same_qC)
                for part, left, right in self._pairs(rows_qC[at_P, candidate_P], positive_q1[at_P, 0]):
                    out_qC[at_P[part], candidate_P[part]] |= (left == right).all(axis=1)
        return out_qC

    def too_similar(self, queries_P: np.ndarray, rows_P: np.ndarray) -> np.ndarray:
        """int8 [P]: 0, or the code of candidates whose cosine with a positive of their query is too high."""
        out_P = np.zeros(len(rows_P), dtype=np.int8)
        for positive_P in self.rows_QM[queries_P].T:
            at = np.flatnonzero((positive_P != ABSENT) & (out_P == 0))
            for part, left, right in self._pairs(rows_P[at], positive_P[at]):
                lengths = np.sqrt(pair_scores(left, left) * pair_scores(right, right))
                out_P[at[part][pair_scores(left, right) >= self.max_similarity * lengths]] = CODE[Reason.TOO_CLOSE]
        return out_P

    def _pairs(self, left_P: np.ndarray, right_P: np.ndarray) -> Any:
        """(slice, float32 [p, D], float32 [p, D]): vectors of pairs of documents, a few at a time."""
        for start in range(0, len(left_P), 4096):
            part = slice(start, start + 4096)
            yield part, *(np.asarray(self.documents[rows[part]], dtype=np.float32) for rows in (left_P, right_P))


@dataclass
class _Mining:
    """One call: searches as deep as it takes."""

    known: _Positives
    rule: SearchedRule
    limits: Limits
    count: int
    seed: int
    precision: str
    device: str

    def run(self) -> np.ndarray:
        """int64 [Q, K]; see `mine_vectors`."""
        out_QK = np.full((len(self.known.query_QD), self.count), ABSENT, dtype=np.int64)
        left, depth = np.arange(len(out_QK)), self._first_depth()
        while len(left):
            best, kept_qC, whole_q = self._candidates(left, depth, self._wanted)
            done_q = whole_q | (kept_qC.sum(axis=1) >= self._wanted)
            out_QK[left[done_q]] = picked(best.ids_QK, self._columns(left, kept_qC, best))[done_q]
            left, depth = left[~done_q], 4 * depth
        return out_QK

    def run_capped(self, cap: int) -> np.ndarray:
        """The same with no document serving more than `cap` queries: lists are deepened until none ran out early."""
        queries, depth = len(self.known.query_QD), self._first_depth() + self.count
        while True:
            best, kept_QC, whole_Q = self._candidates(np.arange(queries), depth, None)
            in_order_QC = first_allowed(kept_QC, best.k)
            rows_QC = picked(best.ids_QK, in_order_QC)
            columns_QK = cap_documents(rows_QC, picked(best.scores_QK, in_order_QC, -np.inf), self.count, cap)
            if (whole_Q | (columns_QK != ABSENT).all(axis=1)).all():
                return picked(rows_QC, columns_QK)
            depth *= 4

    @property
    def _wanted(self) -> int:
        return self.rule.top if isinstance(self.rule, SampledTopK) else self.count

    def _first_depth(self) -> int:
        below_positives = isinstance(self.rule, TopKPercPos | TopKMarginPos)
        spare = 0 if below_positives else self.known.most
        if self.known.max_similarity is not None:
            spare += self.known.most + min(self._wanted, 16)
        return self.limits.last or self.limits.first - 1 + self._wanted + spare

    def _candidates(self, queries_q: np.ndarray, depth: int, count: int | None) -> tuple[Best, np.ndarray, np.ndarray]:
        """The best `depth` documents, bool [q, C]: the first `count` (None: all) that may be negatives, and bool [q]:
        queries for which a deeper search gives no others."""
        known, documents = self.known, len(self.known.documents)
        depth = max(min(depth, documents), self.count, 1)
        limits = self.limits.of(queries_q)
        ranked = isinstance(self.rule, TopKShifted | RankWindow)
        capped = not ranked and bool(np.isfinite(limits.ceiling_Q).any())
        result = search_shards(
            known.query_QD[queries_q],
            numbered(known.documents),
            plain=0 if capped else depth,
            under=depth if capped else 0,
            ceiling_Q=limits.ceiling_Q if capped else None,
            id_type=np.int64,
            precision=self.precision,
            device=self.device,
        )
        best = result.plain or result.under
        assert best is not None
        never_qC = known.never(queries_q, best.ids_QK, best.scores_QK)
        block = Block(best.scores_QK, np.isfinite(best.scores_QK), never_qC)

        def check(row: np.ndarray, column: np.ndarray) -> np.ndarray:
            return known.too_similar(queries_q[row], best.ids_QK[row, column])

        kept_qC = decide(block, limits, count or depth, None if known.max_similarity is None else check)[1]
        whole_q = ~np.isfinite(best.scores_QK[:, -1]) | (depth >= min(limits.last or documents, documents))
        return best, kept_qC, whole_q

    def _columns(self, queries_q: np.ndarray, kept_qC: np.ndarray, best: Best) -> np.ndarray:
        if not isinstance(self.rule, SampledTopK):
            return first_allowed(kept_qC, self.count)
        keys_q = mix(np.uint64(self.seed % 2**64) + np.zeros(1, np.uint64)) ^ queries_q.astype(np.uint64)
        return draw_sampled(kept_qC, best.scores_QK, self.count, self.rule, keys_q, best.ids_QK.astype(np.uint64))


def _random(known: _Positives, count: int, seed: int) -> np.ndarray:
    """int64 [Q, count]: uniform draws without replacement, positives and their copies excluded."""
    out_QK = np.full((len(known.query_QD), count), ABSENT, dtype=np.int64)
    for query in range(len(out_QK)):
        at = np.array([query])

        def accept(order: list[int], at: np.ndarray = at) -> list[int]:
            rows_C = np.array(order, dtype=np.int64)
            vectors_CD = np.asarray(known.documents[rows_C], dtype=np.float32)
            scores_C = gathered_scores(known.query_QD, np.repeat(at, len(order)), vectors_CD, np.arange(len(order)))
            if not np.isfinite(scores_C).all():
                bad = order[int(np.isfinite(scores_C).argmin())]
                raise UserError(f"query {at[0]} or document {bad} is not finite; correct it.")
            refused_C = known.never(at, rows_C[None], scores_C[None])[0]
            if known.max_similarity is not None:
                refused_C |= known.too_similar(np.repeat(at, len(order)), rows_C) > 0
            return [int(row) for row in rows_C[~refused_C]]

        rows = draw_accepted(example_generator(seed, "", str(query)), len(known.documents), count, accept)
        out_QK[query, : len(rows)] = rows
    return out_QK
