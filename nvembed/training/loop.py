"""The training loop, for teacher and student, both stages, any engine, any number of ranks.

It is free of Ray and MLflow: it calls a `WorkerContext`, reads a stream of global batches, and writes `metrics.jsonl`,
`starts.jsonl`, `checkpoints/`, and at the end `model/` and `objective.safetensors`.

Exactness: a step depends on the weights, the optimiser's moments, the global batch and random numbers seeded from
(seed, step, rank), all of which a resumed run has; see DESIGN.md "Exactness".
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Protocol

import torch
import torch.distributed as dist

from nvembed.core import storage
from nvembed.core.distributed import WorkerContext, broadcast_object
from nvembed.core.runtime import trim
from nvembed.core.steps import METRICS, STARTS
from nvembed.losses.objectives import Objective
from nvembed.modeling.precision import resolve_precision
from nvembed.training.arithmetic import learning_rate_factor, slice_budget
from nvembed.training.build import TrainingSpec, build_model, save_trained_model
from nvembed.training.checkpoint import Checkpoint, CheckpointStore, Identity
from nvembed.training.chunked import backward_global_batch
from nvembed.training.engine import Engine, build_engine
from nvembed.training.errors import NonFiniteError
from nvembed.training.metrics import MetricsLog, hash_ids, record_start
from nvembed.training.sharding import Sharding, shard
from nvembed.types import Batch, UserError

logger = logging.getLogger(__name__)

NAMED = 20  # examples an error message names


class BatchStream(Protocol):
    """A training stream, as `stream.reader.StreamReader` reads it."""

    num_steps: int
    batch_size: int
    teacher_dim: int | None

    def batches(self, start: int) -> Iterator[Batch]:
        """Global batches from optimiser step `start` to the end."""
        ...


def train(spec: TrainingSpec, stream: BatchStream, context: WorkerContext) -> None:
    """Train from the newest complete checkpoint (or the start) to the model folder.

    Raises:
        UserError: batch and ranks do not fit, or the checkpoint belongs to another run.
        NonFiniteError: a loss or gradient was not finite; the checkpoints before it stay.
        LeaseLostError: another run has taken the output over.
    """
    check_batch(stream.batch_size, context.world_size)
    torch.set_num_threads(spec.config.threads_per_worker)
    precision = broadcast_object(resolve_precision(spec.config.precision, context.device()))  # one for unlike machines
    store = CheckpointStore(spec.work_uri, Identity(spec.config, spec.inputs, precision, context.world_size))
    checkpoint = store.newest(context)
    start = checkpoint.step if checkpoint else 0
    if context.rank == 0:
        context.check_lease()
        logger.info("%s: starting at step %d of %d, %s", spec.work_uri, start, stream.num_steps, precision)
        row = {"step": start, "time": time.time(), "world_size": context.world_size, "precision": precision}
        record_start(storage.join(spec.work_uri, STARTS), row)
    if start < stream.num_steps:
        _take_steps(spec, stream, context, store, checkpoint)
        checkpoint = store.newest(context)
    assert checkpoint is not None and checkpoint.step == stream.num_steps
    if context.rank == 0:
        context.check_lease()
        save_trained_model(spec, checkpoint, stream.teacher_dim)
    context.report({"step": stream.num_steps, "model": storage.join(spec.work_uri, "model")})


def check_batch(global_batch_size: int, num_workers: int) -> None:
    """Check that the global batch divides evenly over the ranks.

    Raises:
        UserError: it does not; the message has both numbers.
    """
    if global_batch_size % num_workers:
        raise UserError(
            f"stream.global_batch_size {global_batch_size} cannot be divided by train.num_workers {num_workers}. "
            f"Use {max(1, global_batch_size // num_workers) * num_workers}, or another number of workers."
        )


def _take_steps(
    spec: TrainingSpec, stream: BatchStream, context: WorkerContext, store: CheckpointStore, resumed: Checkpoint | None
) -> None:
    """Train from the checkpoint to the last optimiser step, which is always saved."""
    config = spec.config
    model = build_model(spec, stream.teacher_dim, store.identity.precision)
    if resumed:
        resumed.load_parameters(model)
    engine = build_engine(model, config.optimiser, config.engine, context.device())
    if resumed:
        engine.load_moments(resumed.read, resumed.step)
    start = resumed.step if resumed else 0
    zero_stage = config.engine.zero_stage if config.engine.type == "deepspeed" else 0
    tokens = slice_budget(config.token_budget, zero_stage, context.device().type)
    log = MetricsLog(storage.join(spec.work_uri, METRICS), start) if context.rank == 0 else None
    with closing(stream.batches(start)) as batches:  # type: ignore[type-var]
        for batch in batches:
            started = time.monotonic()
            seed_step(config.seed, batch.step, context.rank)
            sharding = shard(batch, config.token_budget, context.rank, context.world_size, slice_budget=tokens)
            factor = learning_rate_factor(batch.step, stream.num_steps, config.optimiser)
            loss, norm = optimiser_step(engine, sharding, factor)
            if engine.device.type == "cpu":
                trim()  # texts differ in length from step to step: freed blocks do not fit the next step's
            cosines = global_separation(engine.model.objective)
            if log is not None:
                context.check_lease()
                row = {
                    "step": batch.step,
                    "loss": loss,
                    "lr": config.optimiser.learning_rate * factor,
                    "grad_norm": norm,
                    **cosines,
                    "sample_ids_sha256": hash_ids(batch.example_ids),
                    "tokens": int(batch.token_lengths.sum()),
                    "chunks": len(sharding.own_chunks),
                    "seconds": round(time.monotonic() - started, 4),
                }
                log.append(row)
            done = batch.step + 1
            if done % config.checkpoint_every == 0 or done == stream.num_steps:
                if log is not None:
                    context.check_lease()
                    log.flush()
                store.save(engine, done, context)
    if log is not None:
        log.close()


def optimiser_step(engine: Engine, sharding: Sharding, factor: float) -> tuple[float, float]:
    """Gradient of a global batch and one update.

    Args:
        engine: holds weights and moments.
        sharding: the batch as this rank sees it.
        factor: share of the peak learning rate.

    Returns:
        Global loss, and gradient norm before clipping.

    Raises:
        NonFiniteError: on every rank, naming the step and the examples.
    """
    loss = backward_global_batch(engine, sharding, engine.model.embedder.tokeniser)
    if sharding.world_size > 1:
        dist.all_reduce(loss)
    _check_finite("loss", float(loss), sharding.batch)
    norm = engine.step(factor)
    _check_finite("gradient norm", norm, sharding.batch)
    return float(loss), norm


def global_separation(objective: Objective) -> dict[str, float]:
    """Mean cosine of the queries of the last global batch to their positive, to their negatives and to the hardest.

    Empty where the objective has no negatives, or no query had one. Collective: every rank calls it.
    """
    if objective.separation is None:
        return {}
    sums = objective.separation.clone()
    if dist.is_initialized():
        dist.all_reduce(sums)
    *cosines, rows = sums.tolist()
    names = ("positive_similarity", "negative_similarity", "hardest_similarity")
    return {name: value / rows for name, value in zip(names, cosines, strict=True)} if rows else {}


def _check_finite(what: str, value: float, batch: Batch) -> None:
    if not math.isfinite(value):
        more = f" and {batch.batch_size - NAMED} more" if batch.batch_size > NAMED else ""
        raise NonFiniteError(
            f"the {what} is {value} at step {batch.step}; examples {', '.join(batch.example_ids[:NAMED])}{more}. The "
            "checkpoints before it stay. Lower the learning rate, or look at these examples."
        )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers (dropout) of a step are a function of (seed, step, rank)."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big", signed=True))
