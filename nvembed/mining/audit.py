"""What mining did, in numbers: counts, refused shares by reason, histograms. Sums only, so parts can be merged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from nvembed.data.tables import document_text, read_rows
from nvembed.mining.selection import Reason, Selection
from nvembed.types import Artifact

SCORE_EDGES = tuple(round(-1.0 + 0.05 * index, 2) for index in range(41))
RANK_BUCKETS = ((1, 1), (2, 5), (6, 10), (11, 20), (21, 50), (51, 100))


class Audit:
    """Counters and histograms of one part of a data set."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.per_example: Counter[str] = Counter()
        self.positive_ranks: Counter[str] = Counter()
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

    def add_example(self, negatives: int, asked: int) -> None:
        """Count a mined example."""
        self.counts["mined"] += 1
        self.counts["negatives"] += negatives
        self.counts["with_fewer"] += negatives < asked
        self.per_example[str(negatives)] += 1

    def dump(self) -> dict[str, Any]:
        """JSON form; see `merge`."""
        return {
            "counts": dict(self.counts),
            "rejected": dict(self.rejected),
            "per_example": dict(self.per_example),
            "positive_ranks": dict(self.positive_ranks),
            "histograms": {name: counts.tolist() for name, counts in self.histograms.items()},
        }

    def merge(self, dumped: Mapping[str, Any]) -> None:
        """Add the JSON form of another part."""
        self.counts.update(dumped["counts"])
        self.rejected.update(dumped["rejected"])
        self.per_example.update(dumped["per_example"])
        self.positive_ranks.update(dumped["positive_ranks"])
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
            "score_histograms": {
                "edges": list(SCORE_EDGES),
                **{name: counts.tolist() for name, counts in self.histograms.items()},
            },
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
