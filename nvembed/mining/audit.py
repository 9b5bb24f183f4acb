"""What mining did, in numbers: counts, refused shares by reason, histograms. Sums only, so parts can be merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nvembed.data.tables import document_text, read_rows
from nvembed.mining.config import CeilingRule, TopKAbs, TopKMarginPos, TopKPercPos
from nvembed.mining.rules import ceilings
from nvembed.mining.selection import Reason, Selection, jaccard, word_triples
from nvembed.types import Artifact

SCORE_EDGES = tuple(round(-1.0 + 0.05 * index, 2) for index in range(41))
RANK_BUCKETS = ((1, 1), (2, 5), (6, 10), (11, 20), (21, 50), (51, 100))
# What each of NV-Retriever's ceilings would refuse of the candidates, whatever rule was used
COMPARED_RULES: tuple[CeilingRule, ...] = (
    TopKAbs(max_score=0.7),
    TopKMarginPos(margin=0.05),
    TopKPercPos(share=0.95),
)
NEAR = 0.8  # shared word triples (Jaccard) from which two texts count as near copies in the audit
HUBS = 20


class Audit:
    """Counters and histograms of one part of a data set."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.per_example: Counter[str] = Counter()
        self.positive_ranks: Counter[str] = Counter()
        self.refused_by: Counter[str] = Counter()
        self.hubs: Counter[str] = Counter()  # documents by the queries they are a negative of
        self.histograms = {
            name: np.zeros(len(SCORE_EDGES) - 1, dtype=np.int64) for name in ("positives", "negatives", "rejected")
        }

    def add_scores(self, name: str, scores: Iterable[float]) -> None:
        """Count scores into the histogram `positives`, `negatives` or `rejected`."""
        values = np.clip(np.fromiter(scores, dtype=np.float64), -1.0, 1.0)
        self.histograms[name] += np.histogram(values, bins=np.array(SCORE_EDGES))[0]

    def add_rank(self, rank: int | None, depth: int) -> None:
        """Count the rank (1-based) of a positive among all documents; None when it is below the searched depth."""
        if rank is None:
            self.positive_ranks[f">{depth}"] += 1
            return
        for low, high in RANK_BUCKETS:
            if low <= rank <= high:
                self.positive_ranks[str(low) if low == high else f"{low}-{high}"] += 1
                return
        self.positive_ranks[f"{RANK_BUCKETS[-1][1] + 1}-{depth}"] += 1

    def add_selection(self, selection: Selection, scores: list[float]) -> None:
        """Count what was decided about a query's candidates."""
        self.rejected.update(reason.value for reason in selection.rejected.values())
        self.counts["candidates_decided"] += len(selection.kept) + len(selection.rejected)
        self.add_scores("rejected", (scores[index] for index in selection.rejected))

    def add_positives(
        self, scores: Sequence[float], own: Sequence[str], row: Mapping[str, Any], depth: int
    ) -> int | None:
        """Count ranks and scores of an example's own positives; returns the best rank, None below the depth."""
        place = {item["id"]: index + 1 for index, item in enumerate(row["plain"])}
        ranks = [place.get(key) for key in own]
        for rank in ranks:
            self.add_rank(rank, depth)
        self.add_scores("positives", scores)
        return min((rank for rank in ranks if rank is not None), default=None)

    def add_rules(self, row: Mapping[str, Any], lowest: float) -> None:
        """Count what the compared rules would refuse of the candidates that are no positives."""
        positives = {item["id"] for item in row["positives"]}
        scores = np.array([item["score"] for item in row["plain"] if item["id"] not in positives])
        self.counts["compared"] += len(scores)
        for rule in COMPARED_RULES:
            self.refused_by[rule_name(rule)] += int((scores >= ceilings(rule, np.array([lowest]))).sum())

    def add_example(self, negatives: Sequence[Mapping[str, Any]], asked: int) -> None:
        """Count a mined example and its negatives (id, score or None)."""
        self.counts["mined"] += 1
        self.counts["negatives"] += len(negatives)
        self.counts["with_fewer"] += len(negatives) < asked
        self.per_example[str(len(negatives))] += 1
        self.add_scores("negatives", (item["score"] for item in negatives if item["score"] is not None))
        self.hubs.update(item["id"] for item in negatives)

    def dump(self) -> dict[str, Any]:
        """JSON form; see `merge`."""
        return {
            "counts": dict(self.counts),
            "rejected": dict(self.rejected),
            "per_example": dict(self.per_example),
            "positive_ranks": dict(self.positive_ranks),
            "refused_by": dict(self.refused_by),
            "hubs": dict(self.hubs),
            "histograms": {name: counts.tolist() for name, counts in self.histograms.items()},
        }

    def merge(self, dumped: Mapping[str, Any]) -> None:
        """Add the JSON form of another part."""
        self.counts.update(dumped["counts"])
        self.rejected.update(dumped["rejected"])
        self.per_example.update(dumped["per_example"])
        self.positive_ranks.update(dumped["positive_ranks"])
        self.refused_by.update(dumped["refused_by"])
        self.hubs.update(dumped["hubs"])
        for name, counts in dumped["histograms"].items():
            self.histograms[name] += np.array(counts, dtype=np.int64)

    def summary(self, *, task: str, way: str, examples: int, dropped: Mapping[str, int]) -> dict[str, Any]:
        """One data set's part of `audit.json`.

        Args:
            way: how the negatives were found, in words.
            examples: training examples of the data set.
            dropped: examples that could not be mined, by reason.
        """
        decided = self.counts["candidates_decided"]
        mined = self.counts["mined"]
        ranks = sorted(
            self.positive_ranks.items(), key=lambda item: (item[0][0] == ">", int(item[0].split("-")[0].strip(">")))
        )
        return {
            "task": task,
            "way": way,
            "examples": examples,
            "mined": mined,
            "dropped": dict(dropped),
            "negatives": self.counts["negatives"],
            "negatives_given": self.counts["given"],
            "negatives_per_example": dict(sorted(self.per_example.items(), key=lambda item: int(item[0]))),
            "with_fewer": self.counts["with_fewer"],
            "with_fewer_share": self.counts["with_fewer"] / mined if mined else 0.0,
            "searched_below_the_ceiling": self.counts["deepened"],
            "candidates_decided": decided,
            "rejected": {
                reason.value: {
                    "count": self.rejected[reason.value],
                    "share": self.rejected[reason.value] / decided if decided else 0.0,
                }
                for reason in Reason
            },
            "positive_ranks": dict(ranks),
            "refused_by_rule": {
                name: {"count": self.refused_by[name], "share": self.refused_by[name] / self.counts["compared"]}
                for name in [rule_name(rule) for rule in COMPARED_RULES]
                if self.counts["compared"]
            },
            "hubs": self.hub_summary(),
            "score_histograms": {
                "edges": list(SCORE_EDGES),
                **{name: counts.tolist() for name, counts in self.histograms.items()},
            },
        }

    def hub_summary(self) -> dict[str, Any]:
        """Documents that serve many queries: the largest, and how much of all negatives the most used 1 % are."""
        counts = sorted(self.hubs.values(), reverse=True)
        largest = sorted(self.hubs.items(), key=lambda item: (-item[1], item[0]))[:HUBS]
        top = counts[: max(len(counts) // 100, 1)] if counts else []
        return {
            "documents": len(counts),
            "largest": [{"id": key, "queries": count} for key, count in largest],
            "share_of_top_percent": sum(top) / sum(counts) if counts else 0.0,
        }


def rule_name(rule: CeilingRule) -> str:
    """A rule with its number, as the audit lists it."""
    (number,) = (value for key, value in rule.model_dump().items() if key != "type")
    return f"{rule.type} {number:g}"


def near_copies(prepare: Artifact, dataset: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many negatives nearly repeat a positive, or another negative, of their query, among some mined rows."""
    wanted = [item["id"] for row in rows for item in row["positives"] + row["negatives"]]
    table = read_rows(prepare.path(dataset, "corpus.parquet"), "id", wanted, ["id", "title", "text"])
    triples = {row["id"]: word_triples(document_text(row["title"], row["text"])) for row in table.to_pylist()}
    of_positive = of_negative = negatives = 0
    for row in rows:
        positives, kept = ([triples[item["id"]] for item in row[role]] for role in ("positives", "negatives"))
        negatives += len(kept)
        for place, found in enumerate(kept):
            of_positive += any(jaccard(found, other) >= NEAR for other in positives)
            of_negative += any(jaccard(found, other) >= NEAR for other in kept[:place])
    return {
        "examples": len(rows),
        "negatives": negatives,
        "near_copies_of_a_positive": of_positive,
        "near_copies_of_a_negative": of_negative,
        "jaccard": NEAR,
    }


def short_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What of a data set's audit stands in the manifest."""
    return {
        "mined": summary["mined"],
        "negatives": summary["negatives"],
        "with_fewer_share": summary["with_fewer_share"],
        "rejected_share": {reason: value["share"] for reason, value in summary["rejected"].items()},
        "dropped": summary["dropped"],
    }


def samples(prepare: Artifact, dataset: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Texts of some mined rows, for reading by a person. Only written when the recipe asks (`audit_samples`)."""
    queries = {
        row["id"]: row["query"]
        for row in read_rows(
            prepare.path(dataset, "examples-train.parquet"), "id", [row["example_id"] for row in rows], ["id", "query"]
        ).to_pylist()
    }
    wanted = [item["id"] for row in rows for item in row["positives"] + row["negatives"]]
    texts = {
        row["id"]: document_text(row["title"], row["text"])
        for row in read_rows(prepare.path(dataset, "corpus.parquet"), "id", wanted, ["id", "title", "text"]).to_pylist()
    }
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
