"""Encode a directory of text shards into vector shards in a Ray Data actor pool.

Each actor loads a model once, then turns one text shard after another into the vector shard of the same name. Windows
never cross a shard, so a vector depends on its shard's content only, never on the number of actors or their timing.
A vector shard records its text shard and model; a restarted run reuses the shards that still match.

With a cache, a run looks in the parts that were there when it first started on this output, and so do its restarts:
its bytes depend on the texts and on those parts, not on timing or kills.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import xxhash

from nvembed.core import storage
from nvembed.core.parquet import count_rows, list_shards, parse_table, read_schema
from nvembed.core.ray_tasks import ProgressLog, run_pool
from nvembed.core.vectors import vector_table, write_shard
from nvembed.retrieval.cache import UNKNOWN, VectorCache, fingerprint, parts_at_start, remove_damaged
from nvembed.retrieval.cache_merge import merge_small
from nvembed.retrieval.config import EncodeConfig
from nvembed.retrieval.encode_report import EncodeReport
from nvembed.retrieval.encoders import (
    Encoder,
    Model,
    check_model,
    model_identity,
    open_encoder,
)
from nvembed.retrieval.rows import encode_checked, refuse_rejected

if TYPE_CHECKING:
    pass

__all__ = ["EncodeReport", "Encoding", "encode_each", "encode_shards", "read_rejected"]

logger = logging.getLogger(__name__)

_MADE_FROM, _REJECTED, _CUT = b"nvembed.made_from", b"nvembed.rejected", b"nvembed.cut"
_LOOKED_IN = "cache-parts.json"
_SHOWN = 5


@dataclass(frozen=True)
class Encoding:
    """Text shards and the model that encodes them.

    Attributes:
        source_uri: text shards `part-*.parquet` (key, text, instruction: the rendered prompt), at any depth.
        model: see `open_encoder`.
        out_uri: gets `key, vector` shards under the same relative names; vector shards there that were made from the
            same text shard by the same model and settings are reused, any other is replaced or removed.
        may_reject: names of directories, such as "documents", whose rows may go without a vector: a text that cannot be
            embedded is left out of the shard and counted. Anywhere else such a text is an error, because later steps
            expect a vector for every row.
    """

    source_uri: str
    model: Model
    out_uri: str
    may_reject: tuple[str, ...] = ()


def encode_shards(
    source_uri: str, model: Model, out_uri: str, config: EncodeConfig, *, may_reject: Collection[str] = ()
) -> EncodeReport:
    """Encode the text shards under a directory with one model: `encode_each` of one `Encoding`."""
    return encode_each([Encoding(source_uri, model, out_uri, tuple(may_reject))], config)[0]


def encode_each(encodings: Sequence[Encoding], config: EncodeConfig) -> list[EncodeReport]:
    """Encode text shards with their models, one model after another, in one actor pool.

    An actor holds one model at a time: it opens the next with the first shard that asks for it.

    Returns:
        A report for each encoding.

    Raises:
        UserError: a model is missing or cannot be loaded; a text cannot be embedded (see `Encoding.may_reject`), or
            more than `config.max_rejected_share` of the texts of an encoding.
    """
    for encoding in encodings:
        check_model(encoding.model)
    works, reports, tasks = [], [], []
    for number, encoding in enumerate(encodings):
        work, report, waiting = _planned(encoding, config)
        works.append(work)
        reports.append(report)
        tasks += [{"encoding": number, **task} for task in waiting]
    totals = [report.reused_rows for report in reports]
    for task in tasks:
        totals[task["encoding"]] += task["rows"]
    pool = run_pool(
        ShardEncoder,
        {"works": works, "config": config, "first": tasks[0]["encoding"] if tasks else 0},
        tasks,
        actors=config.actors,
        cpus=config.cpus_per_actor,
        gpus=config.gpus_per_actor,
    )
    progress = ProgressLog("encode", sum(task["rows"] for task in tasks), "texts")
    for result in pool:
        report = reports[result["encoding"]]
        report.add(result)
        report.check_share(totals[result["encoding"]], config.max_rejected_share)
        progress.add(result["rows"])
    for work, report, total in zip(works, reports, totals, strict=True):
        report.check_share(total, config.max_rejected_share)
        _settle_cache(report, work.model_hash, config)
        if report.rejected:
            count = sum(report.rejected.values())
            logger.warning("encode: %d of %d texts have no vector: %s", count, total, report.rejected)
    return reports


@dataclass(frozen=True)
class EncodingWork:
    """An encoding as its actors receive it.

    Attributes:
        identity: see `encode_identity`; stored in every vector shard.
        model_hash: `model_identity`.
        cache_parts: the cache's parts in which the run looks, by fingerprint.
    """

    encoding: Encoding
    identity: str
    model_hash: str = ""
    cache_parts: Mapping[str, list[str]] = field(default_factory=dict)


def _planned(encoding: Encoding, config: EncodeConfig) -> tuple[EncodingWork, EncodeReport, list[dict[str, Any]]]:
    """The shards of an encoding that are to be made; complete ones are in the report."""
    source, out = encoding.source_uri, encoding.out_uri
    model_hash, names, report = model_identity(encoding.model), list_shards(source), EncodeReport()
    identity = encode_identity(encoding.model, config, model_hash)
    for name in set(list_shards(out)) - set(names):
        storage.remove(storage.join(out, name))
    tasks = _tasks(source, out, names, identity, report)
    parts = _looked_in(source, names, model_hash, out, config) if tasks else {}
    return EncodingWork(encoding, identity, model_hash, parts), report, tasks


def _settle_cache(report: EncodeReport, model_hash: str, config: EncodeConfig) -> None:
    """Only when all is encoded: a restart looks in the same parts as the run it continues."""
    if config.cache is not None and report.embedded:
        for name in _fingerprints(model_hash, config):
            merge_small(storage.join(config.cache, name))
    for part in report.damaged:
        remove_damaged(part)


def _tasks(
    source_uri: str, out_uri: str, names: Sequence[str], identity: str, report: EncodeReport
) -> list[dict[str, Any]]:
    """The shards that are to be made; complete ones go into the report."""
    tasks: list[dict[str, Any]] = []
    for name in names:
        rows = count_rows(storage.join(source_uri, name))
        complete = _complete(storage.join(source_uri, name), storage.join(out_uri, name), identity)
        if complete is None:
            tasks.append({"name": name, "rows": rows})
        else:
            report.reused_rows += rows
            report.count_shard(name, rows, *complete)
    if report.reused_rows:
        logger.info("encode: %d rows are complete from an earlier run", report.reused_rows)
    return tasks


def encode_identity(model: Model, config: EncodeConfig, model_hash: str | None = None) -> str:
    """Hash of everything but the text that decides a vector shard; `model_hash`: `model_identity`, where known."""
    settings = {
        "precision": config.precision,
        "token_budget": config.token_budget,
        "threads": config.threads_per_actor,
        "device": _device(config),
        "vector_type": config.vector_type,
        "max_lengths": [config.max_query_length, config.max_document_length],
        "max_text_bytes": config.max_text_bytes,
        "version": 2,  # packed
    }
    return storage.hash_json({"model": model_hash or model_identity(model), "settings": settings})


class ShardEncoder:
    """The worker of an actor: one model at a time, any number of shards."""

    def __init__(self, works: Sequence[EncodingWork], config: EncodeConfig, first: int = 0) -> None:
        self._works, self._config = works, config
        self._open(first)

    def _open(self, number: int) -> None:
        """Open the model of an encoding, and its cache."""
        work, config = self._works[number], self._config
        self._encoder: Encoder | None = None  # two models at once could be more than the memory holds
        gc.collect()
        self._encoder = open_encoder(
            work.encoding.model,
            config.threads_per_actor,
            config.precision,
            token_budget=config.token_budget,
            device=_device(config),
        )
        self._number, self._cache = number, None
        if config.cache is not None:
            name = fingerprint(work.model_hash, self._encoder.precision, config.vector_type)
            self._cache = VectorCache(config.cache, name, config.vector_type, work.cache_parts.get(name, []))

    def work(self, task: dict[str, Any]) -> dict[str, Any]:
        """Encode one shard; see `Worker.work`."""
        if task["encoding"] != self._number:
            self._open(task["encoding"])
        assert self._encoder is not None
        work, name = self._works[self._number], task["name"]
        encoding = work.encoding
        data = storage.read_bytes(storage.join(encoding.source_uri, name))
        source = parse_table(data, ["key", "text", "instruction"])
        prompts = source.column("instruction").to_pylist()  # the column holds rendered prompts
        encoded = encode_checked(
            self._encoder,
            source.column("text").to_pylist(),
            prompts,
            [self._max_length(name, prompt) for prompt in prompts],
            cache=self._cache,
            max_bytes=self._config.max_text_bytes,
        )
        keys = source.column("key").to_pylist()
        if not set(encoding.may_reject) & set(name.split("/")[:-1]):
            refuse_rejected(encoded, [f"text {key!r}" for key in keys], f"shard {name}")
        rejected = [[keys[index], reason] for index, reason in encoded.rejected.items()]
        table = vector_table(source.column("key").take(encoded.accepted_A), encoded.matrix_AD, self._config.vector_type)
        cut = [int((encoded.cut_A == 1).sum()), int((encoded.cut_A == UNKNOWN).sum())]
        metadata = {
            _MADE_FROM: f"{work.identity}:{xxhash.xxh3_128_hexdigest(data)}",
            _REJECTED: json.dumps(rejected),
            _CUT: json.dumps(cut),
        }
        write_shard(table.replace_schema_metadata(metadata), storage.join(encoding.out_uri, name))
        return {
            "encoding": self._number,
            "name": name,
            "rows": source.num_rows,
            "embedded": encoded.embedded,
            "cached": encoded.cached,
            "rejected": rejected,
            "cut": cut,
            "damaged": [] if self._cache is None else self._cache.damaged_uris(),
        }

    def _max_length(self, name: str, prompt: str) -> int | None:
        """Shards in a directory `queries` or `documents` are that; elsewhere a text with a prompt is a query."""
        folders = name.split("/")[:-1]
        query = "queries" in folders or ("documents" not in folders and bool(prompt))
        return self._config.max_query_length if query else self._config.max_document_length


def _device(config: EncodeConfig) -> str:
    return "cuda" if config.gpus_per_actor > 0 else "cpu"


def _looked_in(
    source_uri: str, names: Sequence[str], model_hash: str, out_uri: str, config: EncodeConfig
) -> dict[str, list[str]]:
    """The cache's parts by fingerprint."""
    if config.cache is None:
        return {}
    sizes = {name: storage.size(storage.join(source_uri, name)) for name in names}
    fingerprints = _fingerprints(model_hash, config)
    return parts_at_start(config.cache, fingerprints, storage.join(out_uri, _LOOKED_IN), storage.hash_json(sizes))


def _fingerprints(model_hash: str, config: EncodeConfig) -> list[str]:
    """For both precisions: the actors' processors decide."""
    return [fingerprint(model_hash, precision, config.vector_type) for precision in ("fp32", "bf16")]


def _complete(source_uri: str, target_uri: str, identity: str) -> tuple[list[list[str]], list[int]] | None:
    """Rejected and cut rows that a complete vector shard records; None where the shard is to be made."""
    if not storage.exists(target_uri):
        return None
    try:
        metadata = read_schema(target_uri).metadata or {}
        if metadata.get(_MADE_FROM) != f"{identity}:{storage.checksum(source_uri)}".encode():
            return None
        return json.loads(metadata[_REJECTED]), json.loads(metadata[_CUT])
    except (pa.ArrowInvalid, OSError, KeyError, ValueError):
        return None


def read_rejected(uri: str) -> dict[str, str]:
    """Key and reason of every row that the vector shards under a directory lack."""
    shards = (read_schema(storage.join(uri, name)).metadata for name in list_shards(uri))
    return {key: reason for metadata in shards for key, reason in json.loads(metadata[_REJECTED])}
