"""Encode a directory of text shards into a directory of vector shards, in a Ray Data actor pool.

Each actor loads the model once, then turns one text shard after another into the vector shard of the same name. Windows
never cross a shard, so a vector depends on its shard's content only, never on the number of actors or their timing.
A vector shard records what it was made from; a restarted run keeps those that still match.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from nvembed import storage
from nvembed.retrieval.config import EncodeConfig
from nvembed.retrieval.encoders import Encoder, Model, check_model, open_encoder, resolve_model
from nvembed.retrieval.pool import ProgressLog, run_pool
from nvembed.retrieval.shards import (
    iter_vectors,
    list_shards,
    read_schema,
    read_vectors,
    vector_table,
    write_shard_tables,
    write_table,
    write_text_shards,
)

__all__ = [
    "EncodeReport",
    "encode_texts",
    "iter_vectors",
    "open_encoder",
    "read_vectors",
    "write_shard_tables",
    "write_text_shards",
]

logger = logging.getLogger(__name__)

_MADE_FROM = b"nvembed.made_from"


@dataclass
class EncodeReport:
    """What one call of `encode_texts` did.

    Attributes:
        rows: rows encoded by this call.
        reused_rows: rows of shards that an earlier call had completed.
        workers: "pid@host" of each actor process -> rows it encoded in this call.
        cpu_seconds: CPU time of the actors, without loading the model.
    """

    rows: int = 0
    reused_rows: int = 0
    workers: dict[str, int] = field(default_factory=dict)
    cpu_seconds: float = 0.0


def encode_texts(source_uri: str, model: Model, out_uri: str, config: EncodeConfig) -> EncodeReport:
    """Encode every `part-*.parquet` (key, text, instruction) under a directory.

    Args:
        source_uri: text shards, at any depth.
        model: see `open_encoder`.
        out_uri: gets `key, vector` shards under the same relative names; vector shards there that were made from the
            same text shard by the same model and settings are kept, any other is replaced or removed.

    Raises:
        UserError: the model is missing or cannot be loaded, or it gives a vector that is not finite.
    """
    check_model(model)
    identity = encode_identity(model, config)
    names = list_shards(source_uri)
    for name in set(list_shards(out_uri)) - set(names):
        storage.remove(storage.join(out_uri, name))
    report = EncodeReport()
    tasks: list[dict[str, Any]] = []
    for name in names:
        rows = _rows(storage.join(source_uri, name))
        if _complete(storage.join(source_uri, name), storage.join(out_uri, name), identity):
            report.reused_rows += rows
        else:
            tasks.append({"name": name, "rows": rows})
    if report.reused_rows:
        logger.info("encode: %d rows stand from an earlier run", report.reused_rows)
    progress = ProgressLog("encode", sum(task["rows"] for task in tasks), "texts")
    arguments = {
        "source_uri": source_uri,
        "model": model,
        "out_uri": out_uri,
        "config": config,
        "identity": identity,
    }
    workers: Counter[str] = Counter()
    pool = run_pool(
        ShardEncoder,
        arguments,
        tasks,
        actors=config.actors,
        cpus=config.cpus_per_actor,
        gpus=config.gpus_per_actor,
    )
    for result in pool:
        workers[result["worker"]] += result["rows"]
        report.rows += result["rows"]
        report.cpu_seconds += result["cpu_seconds"]
        progress.add(result["rows"])
    report.workers = dict(sorted(workers.items()))
    return report


def encode_identity(model: Model, config: EncodeConfig) -> str:
    """Hash of everything but the text that decides a vector."""
    resolved: dict[str, Any] = resolve_model(model).model_dump(mode="json")
    if (folder := resolved.get("folder")) is not None:
        resolved["weights"] = storage.hash_json(storage.describe_files(str(folder)))
    settings = {
        "precision": config.precision,
        "token_budget": config.token_budget,
        "threads": config.threads_per_actor,
        "device": _device(config),
    }
    return storage.hash_json({"model": resolved, "settings": settings})


class ShardEncoder:
    """The worker inside an actor: one model, any number of shards."""

    def __init__(self, source_uri: str, model: Model, out_uri: str, config: EncodeConfig, identity: str) -> None:
        self._source_uri, self._out_uri, self._identity = source_uri, out_uri, identity
        self._encoder = open_encoder(
            model,
            config.threads_per_actor,
            config.precision,
            token_budget=config.token_budget,
            device=_device(config),
        )

    def work(self, task: dict[str, Any]) -> dict[str, Any]:
        """Encode one shard; see `Worker.work`."""
        name = task["name"]
        data = storage.read_bytes(storage.join(self._source_uri, name))
        source = pq.read_table(pa.BufferReader(data), columns=["key", "text", "instruction"])
        matrix_ND = encode_rows(
            self._encoder, source.column("text").to_pylist(), source.column("instruction").to_pylist()
        )
        bad = np.flatnonzero(~np.isfinite(matrix_ND).all(axis=1))
        if len(bad):
            key = source.column("key")[int(bad[0])].as_py()
            raise storage.UserError(
                f"the model gives a vector with NaN or infinity for text {key!r} ({len(bad)} such in shard {name}). "
                "Try `precision: fp32`, or check the model's weights."
            )
        made_from = f"{self._identity}:{xxhash.xxh3_128_hexdigest(data)}"
        table = vector_table(source.column("key"), matrix_ND).replace_schema_metadata({_MADE_FROM: made_from})
        write_table(table, storage.join(self._out_uri, name))
        return {"name": name, "rows": source.num_rows}


def encode_rows(encoder: Encoder, texts: list[str], instructions: list[str]) -> np.ndarray:
    """float32 [N, D]; equal (instruction, text) pairs are encoded once and so have equal vectors."""
    place: dict[tuple[str, str], int] = {}
    inverse = [place.setdefault(pair, len(place)) for pair in zip(instructions, texts, strict=True)]
    unique = list(place)
    matrix_UD = encoder.encode([text for _, text in unique], [instruction for instruction, _ in unique])
    return matrix_UD[inverse]


def _device(config: EncodeConfig) -> str:
    return "cuda" if config.gpus_per_actor > 0 else "cpu"


def _rows(uri: str) -> int:
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        return int(pq.read_metadata(file).num_rows)


def _complete(source_uri: str, target_uri: str, identity: str) -> bool:
    if not storage.exists(target_uri):
        return False
    try:
        metadata = read_schema(target_uri).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return False
    return metadata.get(_MADE_FROM) == f"{identity}:{storage.checksum(source_uri)}".encode()
