"""The numbers of mining: counts, refused shares by reason, histograms. Sums only, so parts can be merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nvembed.core.parquet import read_rows
from nvembed.data.tables import document_text
from nvembed.mining.config import CeilingRule, TopKAbs, TopKMarginPos, TopKPercPos
from nvembed.mining.layout import DatasetLayout
from nvembed.mining.rules import ceilings
from nvembed.mining.selection import CODE, NEGATIVE, Reason
from nvembed.text.identity import jaccard, word_triples
from nvembed.types import Artifact

SCORE_EDGES = tuple(round(-1.0 + 0.05 * index, 2) for index in range(41))
_INNER_EDGES = np.array(SCORE_EDGES[1:-1])
RANK_BUCKETS = ((1, 1), (2, 5), (6, 10), (11, 20), (21, 50), (51, 100))
# What each of NV-Retriever's ceilings would refuse of the candidates, whatever rule was used
COMPARED_RULES: tuple[CeilingRule, ...] = (
    TopKAbs(max_score=0.7),
    TopKMarginPos(margin=0.05),
    TopKPercPos(max_negative_to_positive_ratio=0.95),
)
NEAR = 0.8  # shared word triples (Jaccard) from which two texts count as near duplicates in the audit
HUBS = 20
_KINDS = {
    "topk": "mined, best-scored",
    "topk_shifted": "mined, ranks passed over",
    "topk_abs": "mined, below a fixed score",
    "topk_margin_pos": "mined, positive-aware",
    "topk_perc_pos": "mined, positive-aware",
    "rank_window": "mined, a window of ranks",
    "sampled_topk": "mined, drawn from the best",
    "random": "random",
}
_EXAMPLE_BASED = "example-based: positive of the same class, negatives of other classes, drawn at random"
_NO_HUBS = pa.table({"id": pa.array([], pa.string()), "count": pa.array([], pa.int64())})


class Audit:
    """Counters and histograms of one part of a data set.

    Args:
        hub_rows: counted documents that may wait before they are summed up.
    """

    def __init__(self, hub_rows: int = 1 << 20) -> None:
        self._hub_limit = hub_rows
        self.counts: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.per_example: Counter[str] = Counter()
        self.positive_ranks: Counter[str] = Counter()
        self.refused_by: Counter[str] = Counter()
        self._hubs: list[pa.Table] = []  # documents and how many queries they are a negative of; see `add_hubs`
        self._hub_rows = 0  # of the first of these
        self.histograms = {
            name: np.zeros(len(SCORE_EDGES) - 1, dtype=np.int64) for name in ("positives", "negatives", "rejected")
        }

    def add_scores(self, name: str, scores: np.ndarray) -> None:
        """Count scores into the histogram `positives`, `negatives` or `rejected`."""
        bins = np.searchsorted(_INNER_EDGES, scores, side="right")  # scores outside count at the ends
        self.histograms[name] += np.bincount(bins, minlength=len(SCORE_EDGES) - 1)

    def add_ranks(self, rank_N: np.ndarray, depth: int) -> None:
        """Count ranks (1-based) of positives among all documents; 0 for those below the searched depth."""
        count_R = np.bincount(rank_N, minlength=depth + 1)
        named = [(low, high, str(low) if low == high else f"{low}-{high}") for low, high in RANK_BUCKETS]
        named.append((RANK_BUCKETS[-1][1] + 1, depth, f"{RANK_BUCKETS[-1][1] + 1}-{depth}"))
        named.append((0, 0, f">{depth}"))
        for low, high, name in named:
            if count := int(count_R[low : high + 1].sum()):
                self.positive_ranks[name] += count

    def add_decisions(self, code_P: np.ndarray, score_P: np.ndarray) -> None:
        """Count what was decided about queries' candidates: `selection.CODE` and score of each."""
        count_R = np.bincount(code_P, minlength=max(CODE.values()) + 1)
        self.rejected.update({reason.value: int(count_R[code]) for reason, code in CODE.items() if count_R[code]})
        self.counts["candidates_decided"] += int(count_R[NEGATIVE:].sum())
        self.add_scores("rejected", score_P[code_P > NEGATIVE])

    def add_rules(
        self, start_Q: np.ndarray, score_P: np.ndarray, lowest_Q: np.ndarray, at_H: np.ndarray, owner_H: np.ndarray
    ) -> None:
        """Count what the compared rules would refuse of candidates that are no positives.

        Args:
            start_Q: int64 [Q + 1], where each query's candidates begin.
            lowest_Q: float64, the lowest score among each query's positives.
            at_H, owner_H: the positives among the candidates, and their queries.
        """
        length_Q = np.diff(start_Q)
        self.counts["compared"] += len(score_P) - len(at_H)
        for rule in COMPARED_RULES:
            ceiling_Q = ceilings(rule, lowest_Q)
            refused = np.count_nonzero(score_P >= np.repeat(ceiling_Q, length_Q))
            refused -= np.count_nonzero(score_P[at_H] >= ceiling_Q[owner_H])
            self.refused_by[rule_name(rule)] += int(refused)

    def add_examples(self, negatives: pa.ListArray, wanted: int) -> None:
        """Count mined examples by their negatives (`SCORED_IDS`)."""
        length_Q = np.asarray(negatives.value_lengths())
        values = negatives.flatten()
        self.counts["mined"] += len(length_Q)
        self.counts["negatives"] += int(length_Q.sum())
        self.counts["with_fewer"] += int(np.count_nonzero(length_Q < wanted))
        for length, count in enumerate(np.bincount(length_Q)):
            if count:
                self.per_example[str(length)] += int(count)
        self.add_scores("negatives", np.asarray(values.field("score").drop_null()))

    def add_hubs(self, negatives: pa.ChunkedArray) -> None:
        """Count the documents that serve as negatives (`SCORED_IDS`) of mined rows."""
        for chunk in negatives.chunks:
            served = chunk.flatten().field("id").value_counts()
            self._hubs.append(pa.table({"id": served.field("values"), "count": served.field("counts")}))
        if sum(map(len, self._hubs)) > 2 * self._hub_rows + self._hub_limit:
            self._hubs = [self._hub_table()]
            self._hub_rows = len(self._hubs[0])

    def _hub_table(self) -> pa.Table:
        whole = pa.concat_tables([_NO_HUBS, *self._hubs])
        return whole.group_by("id").aggregate([("count", "sum")]).rename_columns({"count_sum": "count"})

    def dump(self) -> dict[str, Any]:
        """JSON form; see `merge`. Without the hubs, which are counted from the mined table (`add_hubs`)."""
        counters = {name: dict(counter) for name, counter in self._counters().items()}
        return {**counters, "histograms": {name: counts.tolist() for name, counts in self.histograms.items()}}

    def merge(self, dumped: Mapping[str, Any]) -> None:
        """Add the JSON form of another part."""
        for name, counter in self._counters().items():
            counter.update(dumped[name])
        for name, counts in dumped["histograms"].items():
            self.histograms[name] += np.array(counts, dtype=np.int64)

    def _counters(self) -> dict[str, Counter[str]]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Counter)}

    def summary(self, rule: str, task: str, layout: DatasetLayout | None) -> dict[str, Any]:
        """One data set's part of `audit.json`.

        Args:
            rule: its type.
            task: of the data set.
            layout: counts of its examples; None for classes and clusters.
        """
        counts = self.counts
        dropped = dict(layout.dropped) if layout else {}
        for name, reason in (("alone_in_its_class", "alone_in_its_class"), ("inconsistent", "positive_ranks_too_low")):
            if counts[name]:
                dropped[reason] = counts[name]
        rules = [rule_name(rule) for rule in COMPARED_RULES] if counts["compared"] else []
        ranks = sorted(
            self.positive_ranks.items(), key=lambda item: (item[0][0] == ">", int(item[0].split("-")[0].strip(">")))
        )
        return {
            "task": task,
            "way": _EXAMPLE_BASED if layout is None else _KINDS[rule],
            "examples": layout.examples if layout else counts["mined"] + counts["alone_in_its_class"],
            "mined": counts["mined"],
            "dropped": dropped,
            "negatives": counts["negatives"],
            "negatives_given": counts["given"],
            "negatives_per_example": dict(sorted(self.per_example.items(), key=lambda item: int(item[0]))),
            "with_fewer": counts["with_fewer"],
            "with_fewer_share": _share(counts["with_fewer"], counts["mined"])["share"],
            "searched_below_the_ceiling": counts["deepened"],
            "candidates_decided": counts["candidates_decided"],
            "rejected": {
                reason.value: _share(self.rejected[reason.value], counts["candidates_decided"]) for reason in Reason
            },
            "positive_ranks": dict(ranks),
            "refused_by_rule": {name: _share(self.refused_by[name], counts["compared"]) for name in rules},
            "hubs": self.hub_summary(),
            "score_histograms": {
                "edges": list(SCORE_EDGES),
                **{name: counts.tolist() for name, counts in self.histograms.items()},
            },
        }

    def hub_summary(self) -> dict[str, Any]:
        """Documents that serve many queries: the largest, and how much of all negatives the most used 1 % are."""
        table = self._hub_table()
        by_count = [("count", "descending"), ("id", "ascending")]
        largest = table.take(pc.select_k_unstable(table, HUBS, by_count)).to_pylist() if len(table) else []
        counts = np.sort(table.column("count").to_numpy())[::-1]
        top = counts[: max(len(counts) // 100, 1)]
        return {
            "documents": len(counts),
            "largest": [{"id": row["id"], "queries": row["count"]} for row in largest],
            "share_of_top_percent": int(top.sum()) / int(counts.sum()) if len(counts) else 0.0,
        }


def _share(count: int, total: int) -> dict[str, Any]:
    return {"count": count, "share": count / total if total else 0.0}


def rule_name(rule: CeilingRule) -> str:
    """A rule with its number, as the audit lists it."""
    (number,) = (value for key, value in rule.model_dump().items() if key != "type")
    return f"{rule.type} {number:g}"


def near_duplicates(prepare: Artifact, dataset: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many negatives nearly repeat a positive, or another negative, of their query, among some mined rows."""
    triples = {key: word_triples(text) for key, text in _texts(prepare, dataset, rows).items()}
    of_positive = of_negative = negatives = 0
    for row in rows:
        positives, others = ([triples[item["id"]] for item in row[role]] for role in ("positives", "negatives"))
        negatives += len(others)
        for place, negative in enumerate(others):
            of_positive += any(jaccard(negative, other) >= NEAR for other in positives)
            of_negative += any(jaccard(negative, other) >= NEAR for other in others[:place])
    return {
        "examples": len(rows),
        "negatives": negatives,
        "near_duplicates_of_a_positive": of_positive,
        "near_duplicates_of_a_negative": of_negative,
        "jaccard": NEAR,
    }


def samples(prepare: Artifact, dataset: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Texts of some mined rows, for a person to read; written only with `audit_samples`."""
    examples, ids = prepare.path(dataset, "examples-train.parquet"), [row["example_id"] for row in rows]
    queries = {row["id"]: row["query"] for row in read_rows(examples, "id", ids, ["id", "query"]).to_pylist()}
    texts = _texts(prepare, dataset, rows)
    return [
        {
            "example_id": row["example_id"],
            "query": queries[row["example_id"]],
            **{
                role: [{**item, "text": texts[item["id"]]} for item in row[role]] for role in ("positives", "negatives")
            },
        }
        for row in rows
    ]


def _texts(prepare: Artifact, dataset: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Texts of the positives and negatives of some mined rows, by id."""
    wanted = [item["id"] for row in rows for item in row["positives"] + row["negatives"]]
    table = read_rows(prepare.path(dataset, "corpus.parquet"), "id", wanted, ["id", "title", "text"])
    return {row["id"]: document_text(row["title"], row["text"]) for row in table.to_pylist()}


def short_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a data set's audit that goes into the manifest."""
    return {
        "mined": summary["mined"],
        "negatives": summary["negatives"],
        "with_fewer_share": summary["with_fewer_share"],
        "rejected_share": {reason: value["share"] for reason, value in summary["rejected"].items()},
        "dropped": summary["dropped"],
    }
