"""What an encoding run did: rows, what the cache spared, what has no vector and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_LISTED = 100  # rejected rows named in a report; all are counted


@dataclass
class EncodeReport:
    """What one call of `encode_shards` did.

    Attributes:
        rows: rows encoded by this call.
        reused_rows: rows of shards that an earlier call had completed.
        embedded: texts that the model ran on in this call; equal texts of a shard count once.
        cached: different texts of a shard whose vectors came from the cache.
        rejected: why -> rows without a vector, those of reused shards included.
        rejects: shard, key and reason of the first of them.
        damaged: parts of the cache that could not be used and were removed.
        workers: "pid@host" of each actor process -> rows it encoded in this call.
        cpu_seconds: CPU time of the actors, without loading the model.
    """

    rows: int = 0
    reused_rows: int = 0
    embedded: int = 0
    cached: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    rejects: list[dict[str, str]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    workers: dict[str, int] = field(default_factory=dict)
    cpu_seconds: float = 0.0

    def add(self, result: dict[str, Any]) -> None:
        """Count what an actor says of one shard."""
        self.rows += result["rows"]
        self.embedded += result["embedded"]
        self.cached += result["cached"]
        self.cpu_seconds += result["cpu_seconds"]
        self.reject(result["name"], result["rejected"])
        self.damaged = sorted({*self.damaged, *result["damaged"]})
        self.workers = _summed(self.workers, {result["worker"]: result["rows"]})

    def reject(self, shard: str, rows: Sequence[Sequence[str]]) -> None:
        """Count (key, reason) rows of a shard."""
        for key, reason in rows:
            self.rejected[reason] = self.rejected.get(reason, 0) + 1
            if len(self.rejects) < _LISTED:
                self.rejects.append({"shard": shard, "key": key, "reason": reason})

    def merge(self, other: EncodeReport) -> None:
        """Count what another call did, of another model say."""
        self.rows += other.rows
        self.reused_rows += other.reused_rows
        self.embedded += other.embedded
        self.cached += other.cached
        self.cpu_seconds += other.cpu_seconds
        self.damaged = sorted({*self.damaged, *other.damaged})
        self.rejects = [*self.rejects, *other.rejects][:_LISTED]
        self.rejected = _summed(self.rejected, other.rejected)
        self.workers = _summed(self.workers, other.workers)

    def counts(self) -> dict[str, Any]:
        """JSON for a step's metrics."""
        return {
            "rows": self.rows,
            "reused_rows": self.reused_rows,
            "embedded": self.embedded,
            "cached": self.cached,
            "rejected": dict(sorted(self.rejected.items())),
            "rejects": self.rejects,
            "damaged_cache_parts": len(self.damaged),
            "cpu_seconds": self.cpu_seconds,
        }


def _summed(counts: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {name: counts.get(name, 0) + more.get(name, 0) for name in sorted({*counts, *more})}
