"""The arithmetic of a run before it runs: batches, parameters, memory, work (layer 6). Pure; prints nothing.

Everything that depends on texts nobody has read yet is an upper bound, every text at `max_length`, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from nvembed.modeling.config import LoraConfig
from nvembed.recipe import Recipe, resolved_yaml
from nvembed.shapes import Shape, known_shape, pooling_parameters
from nvembed.training.config import TrainConfig

GIB = 2**30
PROCESS_BYTES = 0.75 * GIB  # a worker with torch, transformers, ray and deepspeed loaded, before any weight
ALLOCATOR = 1.3  # what the allocator holds beyond what lives


class _Step(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def what(self) -> str: ...
    @property
    def uri(self) -> str: ...


@dataclass(frozen=True)
class StagePlan:
    """Numbers of one training stage.

    Attributes:
        texts: texts of a global batch.
        chunks_per_rank: forwards of one rank and optimiser step, at most.
        parameters: of the model, pooling included.
        trained: of those that are trained.
        memory_bytes: of one worker, estimated; see `worker_memory`.
        flops: of the whole stage, at most.
    """

    name: str
    steps: int
    examples_per_rank: int
    texts: int
    chunks_per_rank: int
    parameters: int | None = None
    trained: int | None = None
    memory_bytes: float | None = None
    flops: float | None = None


def plan_stage(
    name: str,
    train: TrainConfig,
    *,
    steps: int,
    batch: int,
    group: int,
    max_length: int,
    shape: Shape | None,
    pooling: int,
) -> StagePlan:
    """Plan of one stage.

    Args:
        name: section of the recipe.
        train: how it is trained.
        steps: optimiser steps.
        batch: examples of a global batch.
        group: texts of an example.
        max_length: tokens of a text at most.
        shape: the backbone, None where it is not known.
        pooling: parameters of the pooling head.
    """
    texts = batch * group
    per_chunk = max(1, train.token_budget // max_length)
    workers = train.num_workers
    chunks = -(-texts // per_chunk)
    chunks_per_rank = -(-chunks // workers)
    plan = StagePlan(name, steps, batch // workers, texts, chunks_per_rank)
    if shape is None:
        return plan
    parameters = shape.parameters + pooling
    trained = trained_parameters(train, shape) + pooling
    return replace(
        plan,
        parameters=parameters,
        trained=trained,
        memory_bytes=worker_memory(
            train, shape, parameters, trained, -(-texts // (chunks_per_rank * workers)) * max_length
        ),
        flops=stage_flops(shape, pooling, trained, steps * texts * max_length),
    )


def trained_parameters(train: TrainConfig, shape: Shape) -> int:
    """Backbone parameters that are trained."""
    if isinstance(train.adapter, LoraConfig):
        sizes = [shape.linears[name] for name in train.adapter.target_modules if name in shape.linears]
        return shape.layers * sum(train.adapter.r * (inputs + outputs) for inputs, outputs in sizes)
    return shape.parameters - (shape.embedding_parameters if train.adapter.freeze_embeddings else 0)


def worker_memory(train: TrainConfig, shape: Shape, parameters: int, trained: int, chunk_tokens: int) -> float:
    """Bytes of one worker, estimated.

    fp32 weights, gradients and two AdamW moments, divided over the workers as the ZeRO stage says (1: moments and
    masters, 2: and gradients, 3: and weights), DeepSpeed's flat copy of the masters, the activations of one chunk
    kept for its backward, and what the process itself takes. Checked at one point: stage 1 of the quickstart, 2.2
    and 2.4 GiB measured (PSS of the two workers) for 2.2 estimated.
    """
    stage = train.engine.zero_stage if train.engine.type == "deepspeed" else 0
    share = [1.0, 1.0 / train.num_workers]
    weights = 4 * parameters * share[stage >= 3]
    masters = 4 * trained * share[stage >= 1] if train.engine.type == "deepspeed" else 0
    gradients = 4 * trained * share[stage >= 2]
    moments = 8 * trained * share[stage >= 1] if train.optimiser.type == "adamw" else 0
    activations = ALLOCATOR * activation_bytes(train, shape, parameters > shape.parameters, chunk_tokens)
    return PROCESS_BYTES + weights + masters + gradients + moments + activations


def activation_bytes(train: TrainConfig, shape: Shape, head: bool, chunk_tokens: int) -> float:
    """Bytes that live for the backward of one chunk: per token and layer about 8 hidden and 4 intermediate vectors; a
    latent attention head counts as one layer more. Attention weights are not kept (SDPA)."""
    width = 4 if train.precision == "fp32" else 3  # autocast keeps matmul inputs in bf16, norms and residuals in fp32
    layers = 1 + shape.layers**0.5 if train.engine.gradient_checkpointing else shape.layers
    return chunk_tokens * (layers + head) * width * (8.0 * shape.hidden + 4.0 * shape.intermediate)


def stage_flops(shape: Shape, pooling: int, trained: int, tokens: int) -> float:
    """Floating point operations: 2 per weight and token forward, twice (chunked backward computes it again), 2 per
    weight for the gradient of the states and 2 per trained weight for its own."""
    weights = shape.parameters - shape.embedding_parameters + pooling
    return float(tokens) * (6.0 * weights + 2.0 * min(trained, weights))


def plan_stages(recipe: Recipe) -> list[StagePlan]:
    """Plans of the stages a recipe has."""
    shape, pooling, length = None, 0, 512
    if recipe.initialise is not None:
        shape = known_shape(recipe.initialise.backbone)
        pooling = pooling_parameters(recipe.initialise.embedder.pooling, shape.hidden) if shape is not None else 0
        length = recipe.initialise.embedder.text.max_length
    plans = []
    for name, stage in (("stage_1", recipe.stage_1), ("stage_2", recipe.stage_2)):
        if stage is not None:
            stream = stage.stream
            sizes = {"steps": stream.steps, "batch": stream.global_batch_size, "group": 2 + stream.num_negatives}
            plans.append(plan_stage(name, stage.train, **sizes, max_length=length, shape=shape, pooling=pooling))
    if recipe.student is not None:
        student = recipe.student
        small = None
        if shape is not None:
            small = replace(shape, layers=student.init.num_layers)
        sizes = {"steps": student.stream.steps, "batch": student.stream.global_batch_size, "group": 1}
        plans.append(plan_stage("student", student.train, **sizes, max_length=length, shape=small, pooling=0))
    return plans


def describe(recipe: Recipe, out: str, steps: Sequence[_Step]) -> str:
    """The plan as text: the resolved recipe, the numbers derived from it, and what each step would do."""
    stages = {"stage_1": recipe.stage_1, "stage_2": recipe.stage_2, "student": recipe.student}
    trains = {name: stage.train for name, stage in stages.items() if stage is not None}
    lines = [
        "# resolved recipe",
        resolved_yaml(recipe).rstrip(),
        "",
        "# training (upper bounds: every text at max_length)",
    ]
    for plan in plan_stages(recipe):
        lines += _describe_stage(plan, trains[plan.name])
    lines += ["", f"# steps, below {out}"]
    width = max((len(step.name) for step in steps), default=0)
    lines += [f"{step.name:<{width}}  {_WHAT[step.what]:<7} {step.uri}" for step in steps]
    return "\n".join(lines)


_WHAT = {"skip": "skipped", "resume": "resumed", "run": "run"}


def _describe_stage(plan: StagePlan, train: TrainConfig) -> list[str]:
    workers = train.num_workers
    group = plan.texts // (plan.examples_per_rank * workers)
    engine = f"ZeRO-{train.engine.zero_stage}" if train.engine.type == "deepspeed" else "plain torch"
    lines = [
        f"{plan.name}: {plan.steps} steps, {workers} worker(s) x {train.threads_per_worker} thread(s), {engine}",
        f"  global batch: {plan.examples_per_rank} examples x {workers} workers x {group} texts = {plan.texts} texts; "
        f"<= {plan.chunks_per_rank} chunk(s) of {train.token_budget} tokens per worker; "
        f"{-(-plan.steps // train.checkpoint_every)} checkpoint(s)",
    ]
    if plan.parameters is None or plan.trained is None or plan.memory_bytes is None or plan.flops is None:
        return [*lines, "  backbone not on this machine: parameters and memory are not known yet"]
    return [
        *lines,
        f"  parameters: {plan.parameters:,}, trained {plan.trained:,}; about {plan.memory_bytes / GIB:.1f} GiB per "
        f"worker (estimated); <= {plan.flops / 1e12:,.1f} TFLOP",
    ]
