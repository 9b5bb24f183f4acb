"""The untrained backbone in four variants, and the reference model, in one actor pool.

A variant is a pooling (mean or last token) and a direction (bidirectional or causal). A shard is run once per direction
and pooled both ways. An actor holds one model at a time.

Shapes: N texts, C texts of a chunk, L tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from nvembed.core import storage
from nvembed.core.model_cache import local_model
from nvembed.core.parquet import list_shards, read_table
from nvembed.core.ray_tasks import ProgressLog, run_pool
from nvembed.core.vectors import vector_table, write_shard
from nvembed.modeling.bidirectional import set_bidirectional
from nvembed.modeling.config import MeanConfig
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.folder import load_embedder
from nvembed.modeling.pooling import last_token_pool, mean_pool, normalise
from nvembed.modeling.precision import autocast, resolve_precision
from nvembed.retrieval.config import EncodeConfig, RetrieverConfig
from nvembed.retrieval.encode import encode_rows
from nvembed.retrieval.encoders import open_encoder
from nvembed.text.batching import token_budget_chunks
from nvembed.types import UserError

logger = logging.getLogger(__name__)

Pooling = Literal["mean", "last_token"]
REFERENCE = "reference"


@dataclass(frozen=True)
class Variant:
    """One way to take a vector from a decoder."""

    pooling: Pooling
    bidirectional: bool

    @property
    def name(self) -> str:
        """Key in `scores.json`."""
        return f"{self.pooling}_{'bidirectional' if self.bidirectional else 'causal'}"


VARIANTS = {
    variant.name: variant
    for variant in (Variant(pooling, ahead) for ahead in (True, False) for pooling in ("mean", "last_token"))
}


@dataclass(frozen=True)
class EncodeTask:
    """Text shards of one directory to the vector directory of each system: a variant's name, or `REFERENCE`."""

    source_uri: str
    out_uris: Mapping[str, str]


def encode_systems(tasks: Sequence[EncodeTask], folder: str, reference: RetrieverConfig, config: EncodeConfig) -> float:
    """Encode every shard of every task; vector shards that an earlier call completed are kept.

    Returns:
        CPU seconds of the actors, without loading the models.
    """
    shards = list(_shard_tasks(tasks))
    arguments = {"folder": folder, "reference": reference, "config": config}
    progress = ProgressLog("baselines", sum(task["rows"] for task in shards), "vectors")
    pool = run_pool(
        SystemEncoder,
        arguments,
        shards,
        actors=config.actors,
        cpus=config.cpus_per_actor,
        gpus=config.gpus_per_actor,
    )
    cpu_seconds = 0.0
    for result in pool:
        progress.add(result["rows"])
        cpu_seconds += result["cpu_seconds"]
    return cpu_seconds


def _shard_tasks(tasks: Sequence[EncodeTask]) -> Iterator[dict[str, Any]]:
    """One task per shard and model, the reference model's last: an actor then changes its model once."""
    for is_reference in (False, True):
        for task in tasks:
            outs = {name: uri for name, uri in task.out_uris.items() if (name == REFERENCE) == is_reference}
            for name in list_shards(task.source_uri):
                missing = {key: storage.join(uri, name) for key, uri in outs.items()}
                missing = {key: uri for key, uri in missing.items() if not storage.exists(uri)}
                if missing:
                    source = storage.join(task.source_uri, name)
                    rows = read_table(source, ["key"]).num_rows * len(missing)
                    yield {"source": source, "outs": missing, "rows": rows}


class SystemEncoder:
    """The worker inside an actor."""

    def __init__(self, folder: str, reference: RetrieverConfig, config: EncodeConfig) -> None:
        self._folder, self._reference, self._config = folder, reference, config
        self._device = "cuda" if config.gpus_per_actor > 0 else "cpu"
        self._opened: tuple[bool, Any] | None = None
        torch.set_num_threads(config.threads_per_actor)

    def work(self, task: dict[str, Any]) -> dict[str, Any]:
        """Encode one shard; see `Worker.work`."""
        source = read_table(task["source"], ["key", "text", "instruction"])
        texts, instructions = (source.column(name).to_pylist() for name in ("text", "instruction"))
        if REFERENCE in task["outs"]:
            found = {REFERENCE: encode_rows(self._open(True), texts, instructions)}
        else:
            variants = [VARIANTS[name] for name in task["outs"]]
            found = encode_variants(
                self._open(False),
                texts,
                instructions,
                variants,
                token_budget=self._config.token_budget,
                precision=self._config.precision,
            )
        for name, matrix_ND in found.items():
            if not np.isfinite(matrix_ND).all():
                raise UserError(f"{name} gives a vector with NaN or infinity. Try `precision: fp32`.")
            write_shard(vector_table(source.column("key"), matrix_ND), task["outs"][name])
        return {"rows": task["rows"]}

    def _open(self, is_reference: bool) -> Any:
        if self._opened is None or self._opened[0] != is_reference:
            self._opened = None  # before the next one is loaded: two large models need not fit
            self._opened = (is_reference, self._load_reference() if is_reference else self._load_untrained())
        return self._opened[1]

    def _load_reference(self) -> Any:
        config = self._config
        return open_encoder(
            self._reference,
            config.threads_per_actor,
            config.precision,
            token_budget=config.token_budget,
            device=self._device,
        )

    def _load_untrained(self) -> Embedder:
        folder = local_model(self._folder)
        return load_embedder(folder, pooling=MeanConfig(), bidirectional=True).to(self._device)


@torch.inference_mode()
def encode_variants(
    embedder: Embedder,
    texts: Sequence[str],
    instructions: Sequence[str],
    variants: Sequence[Variant],
    *,
    token_budget: int,
    precision: str,
) -> dict[str, np.ndarray]:
    """float32 [N, D] of each variant: one forward per direction, pooled as asked; the embedder's own pooling is unused.

    Leaves the backbone in the direction of the last variant.
    """
    tokens = embedder.tokeniser.encode(list(texts), list(instructions))
    lengths_N = np.array([len(item.input_ids) for item in tokens], dtype=np.int64)
    device = next(embedder.parameters()).device
    resolved = resolve_precision(precision, device)
    found = {variant.name: np.empty((len(texts), embedder.dim), dtype=np.float32) for variant in variants}
    for bidirectional in dict.fromkeys(variant.bidirectional for variant in variants):
        set_bidirectional(embedder.embedding_model, bidirectional)
        for chunk in token_budget_chunks(lengths_N, token_budget):
            inputs = embedder.tokeniser.collate([tokens[index] for index in chunk], device=device)
            mask_CL = inputs["attention_mask"]
            with autocast(resolved, device):
                states_CLD = embedder.embedding_model(
                    input_ids=inputs["input_ids"], attention_mask=mask_CL, use_cache=False
                ).last_hidden_state
            for variant in (variant for variant in variants if variant.bidirectional == bidirectional):
                last = variant.pooling == "last_token"
                pooled_CD = last_token_pool(states_CLD, mask_CL) if last else mean_pool(states_CLD, inputs["pool_mask"])
                found[variant.name][chunk] = normalise(pooled_CD).cpu().numpy()
    return found
