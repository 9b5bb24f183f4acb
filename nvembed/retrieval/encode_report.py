"""Report of an encoding run: rows, rows from the cache, and rows without a vector by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nvembed.types import UserError

_LISTED = 100  # rejected rows named in a report; all are counted
_SHOWN = 5  # of them in an error


@dataclass
class FolderCounts:
    """Counts of the texts of one directory, reused shards included.

    Attributes:
        texts: rows.
        truncated: rows with a vector of which only the first tokens were embedded.
        unknown: rows with a vector of which the tokenizer, or an older cache, does not record a cut.
        rejected: reason -> rows without a vector.
    """

    texts: int = 0
    truncated: int = 0
    unknown: int = 0
    rejected: dict[str, int] = field(default_factory=dict)

    def add(self, other: FolderCounts) -> None:
        """Add the counts of another directory."""
        self.texts += other.texts
        self.truncated += other.truncated
        self.unknown += other.unknown
        self.rejected = _summed(self.rejected, other.rejected)

    def counts(self) -> dict[str, Any]:
        """JSON; the share is of the texts for which a cut is recorded; None without any."""
        known = self.texts - self.unknown - sum(self.rejected.values())
        return {
            "texts": self.texts,
            "truncated": self.truncated,
            "truncated_share": self.truncated / known if known else None,
            "truncated_unknown": self.unknown,
            "rejected": dict(sorted(self.rejected.items())),
        }


@dataclass
class EncodeReport:
    """Result of one call of `encode_shards`.

    Attributes:
        rows: rows encoded by this call.
        reused_rows: rows of shards that an earlier call had completed.
        embedded: texts that the model ran on in this call; equal texts of a shard count once.
        cached: different texts of a shard whose vectors came from the cache.
        folders: counts of every directory of shards.
        rejects: shard, key and reason of the first of them.
        damaged: parts of the cache that could not be used and were removed.
        workers: "pid@host" of each actor process -> rows it encoded in this call.
        cpu_seconds: CPU time of the actors, without loading the model.
    """

    rows: int = 0
    reused_rows: int = 0
    embedded: int = 0
    cached: int = 0
    folders: dict[str, FolderCounts] = field(default_factory=dict)
    rejects: list[dict[str, str]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    workers: dict[str, int] = field(default_factory=dict)
    cpu_seconds: float = 0.0

    def add(self, result: dict[str, Any]) -> None:
        """Add an actor's counters of one shard."""
        self.rows += result["rows"]
        self.embedded += result["embedded"]
        self.cached += result["cached"]
        self.cpu_seconds += result["cpu_seconds"]
        self.count_shard(result["name"], result["rows"], result["rejected"], result["cut"])
        self.damaged = sorted({*self.damaged, *result["damaged"]})
        self.workers = _summed(self.workers, {result["worker"]: result["rows"]})

    @property
    def rejected(self) -> dict[str, int]:
        """Reason -> rows without a vector."""
        return self.all_folders().rejected

    def all_folders(self) -> FolderCounts:
        """The directories summed up."""
        whole = FolderCounts()
        for counts in self.folders.values():
            whole.add(counts)
        return whole

    def check_share(self, total: int, most: float) -> None:
        """Refuse more rejected texts than a share of all.

        Raises:
            UserError: with their reasons and the first of them.
        """
        count = sum(self.rejected.values())
        if count <= most * total:
            return
        reasons = "; ".join(f"{number} x {reason}" for reason, number in sorted(self.rejected.items()))
        first = "; ".join(f"{row['key']!r} in {row['shard']}" for row in self.rejects[:_SHOWN])
        raise UserError(
            f"encode: {count} of {total} texts cannot be embedded ({reasons}), more than max_rejected_share "
            f"{most:g}. First: {first}. Correct the data, or raise max_rejected_share."
        )

    def count_shard(self, shard: str, rows: int, rejected: Sequence[Sequence[str]], cut: Sequence[int]) -> None:
        """Count the texts of a shard.

        Args:
            rejected: (key, reason) of those without a vector.
            cut: how many of the others were cut, and of how many it is not known.
        """
        reasons = dict(Counter(reason for _, reason in rejected))
        folder = shard.rpartition("/")[0]
        self.folders.setdefault(folder, FolderCounts()).add(FolderCounts(rows, cut[0], cut[1], reasons))
        room = _LISTED - len(self.rejects)
        self.rejects += [{"shard": shard, "key": key, "reason": reason} for key, reason in rejected[:room]]

    def merge(self, other: EncodeReport) -> None:
        """Add the report of another call, for example of another model."""
        self.rows += other.rows
        self.reused_rows += other.reused_rows
        self.embedded += other.embedded
        self.cached += other.cached
        self.cpu_seconds += other.cpu_seconds
        self.damaged = sorted({*self.damaged, *other.damaged})
        self.rejects = [*self.rejects, *other.rejects][:_LISTED]
        self.workers = _summed(self.workers, other.workers)
        for folder, counts in other.folders.items():
            self.folders.setdefault(folder, FolderCounts()).add(counts)

    def counts(self) -> dict[str, Any]:
        """JSON for a step's metrics."""
        totals = self.all_folders().counts()
        return {
            "rows": self.rows,
            "reused_rows": self.reused_rows,
            "embedded": self.embedded,
            "cached": self.cached,
            "rejected": totals["rejected"],
            "rejects": self.rejects,
            "truncated": totals["truncated"],
            "truncated_share": totals["truncated_share"],
            "truncated_unknown": totals["truncated_unknown"],
            "damaged_cache_parts": len(self.damaged),
            "cpu_seconds": self.cpu_seconds,
        }


def _summed(counts: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {name: counts.get(name, 0) + more.get(name, 0) for name in sorted({*counts, *more})}
