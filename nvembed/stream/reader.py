"""Reading a training stream: any step at once, or all from a step on with a bounded prefetch thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nvembed.core import storage
from nvembed.core.parquet import part_uri
from nvembed.core.retry import retried
from nvembed.core.steps import CorruptArtifactError, load_artifact
from nvembed.core.vectors import table_matrix
from nvembed.types import Artifact, Batch, UserError

PREFETCHED_BATCHES = 4


class StreamReader:
    """A published stream.

    Opening it checks that every shard is there with its size; a shard's checksum is checked before its first row is
    used, so that each rank of a long run reads only what it needs.

    Attributes:
        num_steps: optimiser steps in the stream.
        batch_size: B, the global batch.
        group_size: G, texts per example; 1 for distillation.
        teacher_dim: width of the teacher vectors, None for a contrastive stream.
    """

    def __init__(self, uri: str) -> None:
        """Open the artifact of a `stream` or `distill_stream` step.

        Raises:
            CorruptArtifactError: no manifest, or a shard missing or cut short.
        """
        self.artifact: Artifact = load_artifact(uri, verify=False)
        metrics = self.artifact.manifest["metrics"]
        try:
            self.num_steps = int(metrics["steps"])
            self.batch_size = int(metrics["global_batch_size"])
            self.group_size = int(metrics["group_size"])
            self.teacher_dim: int | None = metrics["teacher_dim"]
            self._steps_per_shard = int(metrics["steps_per_shard"])
        except KeyError as error:
            kind = self.artifact.manifest.get("kind")
            raise UserError(f"{uri} is no training stream but the result of a {kind!r} step.") from error
        self._files: dict[str, Any] = dict(self.artifact.manifest["files"])
        self._verified: set[str] = set()
        self._open: tuple[str, Any, pq.ParquetFile] | None = None
        self._check_sizes()

    def __len__(self) -> int:
        return self.num_steps

    def batch(self, step: int) -> Batch:
        """The global batch of one optimiser step.

        Raises:
            IndexError: there is no such step.
            CorruptArtifactError: its shard does not have the checksum of the manifest.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a stream of {self.num_steps}")
        shard, group = divmod(step, self._steps_per_shard)
        table = self._shard(part_uri("shards", shard)).read_row_group(group)
        steps = table.column("step").to_numpy()
        assert len(steps) == self.batch_size and (steps == step).all(), "shards and manifest disagree"
        return _distill_batch(table, step) if self.teacher_dim is not None else _contrastive_batch(table, step)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Batches from `start` to the end; at most `PREFETCHED_BATCHES` are read ahead, in a thread."""
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCHED_BATCHES)
        stopped = threading.Event()

        def put(item: Batch | BaseException | None) -> bool:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def read() -> None:
            try:
                reader = StreamReader(self.artifact.uri)  # own file handles; parquet files are not for two threads
                with contextlib.closing(reader):
                    for step in range(start, self.num_steps):
                        if not put(reader.batch(step)):
                            return
                put(None)
            except BaseException as error:  # handed to the consumer, which raises it
                put(error)

        thread = threading.Thread(target=read, name="stream-prefetch", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    def close(self) -> None:
        """Close the open shard."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    @retried
    def _check_sizes(self) -> None:
        problems = []
        last = (self.num_steps - 1) // self._steps_per_shard
        for name in (part_uri("shards", shard) for shard in range(last + 1)):
            fs, path = storage.filesystem(self.artifact.path(name))
            if name not in self._files or not fs.exists(path):
                problems.append(f"{name}: missing")
            elif (size := int(fs.size(path))) != self._files[name]["size"]:
                problems.append(f"{name}: {size} bytes, expected {self._files[name]['size']}")
        if problems:
            raise self._corrupt("; ".join(problems))

    def _corrupt(self, problem: str) -> CorruptArtifactError:
        return CorruptArtifactError(
            f"{self.artifact.uri} is corrupt: {problem}. Move the directory away and run again to rebuild it."
        )

    def _shard(self, name: str) -> pq.ParquetFile:
        if self._open is not None and self._open[0] == name:
            return self._open[2]
        self.close()
        uri = self.artifact.path(name)
        if name not in self._verified:
            if storage.checksum(uri) != self._files[name]["xxh3_128"]:
                raise self._corrupt(f"{name}: checksum differs")
            self._verified.add(name)
        file = storage.open_reader(uri)
        self._open = (name, file, pq.ParquetFile(file))
        return self._open[2]


def _contrastive_batch(table: pa.Table, step: int) -> Batch:
    groups = table.column("texts").to_pylist()
    size = len(groups[0])
    texts = [text or "" for group in groups for text in group]
    instructions = [
        prefix if place == 0 or both else ""
        for prefix, both in zip(
            table.column("instruction").to_pylist(), table.column("symmetric").to_pylist(), strict=True
        )
        for place in range(size)
    ]
    present = np.array([[text is not None for text in group] for group in groups], bool)
    return Batch(
        step=step,
        example_ids=table.column("example_id").to_pylist(),
        texts=texts,
        instructions=[prefix if here else "" for prefix, here in zip(instructions, present.ravel(), strict=True)],
        token_lengths=np.array(table.column("token_lengths").to_pylist(), np.int32).ravel(),
        present=present,
        document_ids=np.array(table.column("document_ids").to_pylist(), np.int64),
        positive_ids=[np.array(row, np.int64) for row in table.column("positive_ids").to_pylist()],
    )


def _distill_batch(table: pa.Table, step: int) -> Batch:
    rows = table.num_rows
    return Batch(
        step=step,
        example_ids=table.column("example_id").to_pylist(),
        texts=table.column("text").to_pylist(),
        instructions=table.column("instruction").to_pylist(),
        token_lengths=np.array(table.column("token_lengths").to_pylist(), np.int32).ravel(),
        present=np.ones((rows, 1), bool),
        document_ids=np.zeros((rows, 1), np.int64),
        positive_ids=[np.zeros(0, np.int64)] * rows,
        teacher_vectors=np.array(table_matrix(table)),  # writable, as torch wants it
    )
