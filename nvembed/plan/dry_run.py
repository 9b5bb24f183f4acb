"""The text and JSON of a dry run.

Every value of the recipe with its source, the numbers derived from it, DeepSpeed's configuration, and the steps with
their outputs. Secrets are masked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import yaml

from nvembed.core.secrets import mask, mask_all
from nvembed.plan.memory import GIB, Memory, stage_memory
from nvembed.plan.recipe_plan import precision_of
from nvembed.plan.sizes import StageSizes, stage_sizes
from nvembed.plan.work import flops_text, stage_flops
from nvembed.recipe.document import Document, Path, dotted
from nvembed.recipe.schema import Recipe
from nvembed.training.arithmetic import deepspeed_config

DEFAULT = "default"
_WHAT = {"skip": "skipped", "resume": "resumed"}
_COLUMN = 60  # where sources are written, unless the value is longer


class Step(Protocol):
    """A pipeline step, and what a run would do with it."""

    @property
    def name(self) -> str: ...
    @property
    def what(self) -> str: ...
    @property
    def uri(self) -> str: ...


class DryRun(Protocol):
    """A finished dry run; `nvembed.pipeline` has the class."""

    @property
    def out(self) -> str: ...
    @property
    def unreachable(self) -> str | None: ...
    @property
    def steps(self) -> Sequence[Step]: ...


def sources(recipe: Recipe, document: Document) -> dict[str, str]:
    """Source of every value of the resolved recipe: `recipe.yaml:12`, `--set a.b=c` or `default`."""
    return {dotted(path): source_of(document, path) for path, _ in _leaves(recipe.model_dump(mode="json"), ())}


def source_of(document: Document, path: Path) -> str:
    """Source of a value; a value inside one that was set as a whole has the source of that setting."""
    value: Any = document.data
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return DEFAULT
    position = document.position(path)
    if not position.line:
        return mask(str(position))
    return f"{position.source.rsplit('/', 1)[-1]}:{position.line}"


def _leaves(value: Any, path: Path) -> list[tuple[Path, Any]]:
    """Plain values and lists of plain values, with their paths."""
    if isinstance(value, Mapping) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, key))]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [leaf for index, item in enumerate(value) for leaf in _leaves(item, (*path, index))]
    return [(path, value)]


def recipe_lines(recipe: Recipe, document: Document) -> list[str]:
    """The resolved recipe as YAML, the source of each value behind it."""
    lines: list[str] = []
    _write(mask_all(recipe.model_dump(mode="json")), (), "", document, lines)
    return lines


def _write(value: Any, path: Path, indent: str, document: Document, lines: list[str]) -> None:
    items = enumerate(value) if isinstance(value, list) else value.items()
    for key, item in items:
        here = (*path, key)
        name = "-" if isinstance(value, list) else f"{key}:"
        nested = isinstance(item, Mapping) or (isinstance(item, list) and any(isinstance(x, Mapping) for x in item))
        if nested and item:
            start = len(lines)
            _write(item, here, indent + "  ", document, lines)
            if name == "-":  # the first key of an item is written on the item's own line
                lines[start] = f"{indent}- {lines[start].removeprefix(indent + '  ')}"
            else:
                lines.insert(start, f"{indent}{name}")
        else:
            plain = yaml.safe_dump(item, default_flow_style=True, allow_unicode=True, width=10**6)
            written = f"{indent}{name} {plain.removesuffix(chr(10)).removesuffix('...').rstrip()}"
            lines.append(f"{written:<{_COLUMN}}  # {source_of(document, here)}")


def stage_config(stage: StageSizes) -> dict[str, Any] | None:
    """DeepSpeed's configuration; None with the torch engine, or where sizes are not known."""
    if stage.train.engine.type != "deepspeed" or stage.whole is None or stage.trained is None:
        return None
    return deepspeed_config(stage.train.engine, stage.train.optimiser, trained=stage.trained, whole=stage.whole)


def as_json(recipe: Recipe, document: Document, dry_run: DryRun) -> dict[str, Any]:
    """The dry run as plain values."""
    return {
        "recipe": mask_all(recipe.model_dump(mode="json")),
        "sources": sources(recipe, document),
        "out": mask(dry_run.out),
        "unreachable": mask_all(dry_run.unreachable),
        "steps": [{"name": step.name, "what": step.what, "uri": mask(step.uri)} for step in dry_run.steps],
        "stages": {stage.name: _stage_json(stage) for stage in stage_sizes(recipe)},
    }


def _stage_json(stage: StageSizes) -> dict[str, Any]:
    known = stage.model is not None
    memory = stage_memory(stage, precision=precision_of(stage), kind=_kind(stage)) if known else None
    return {
        "steps": stage.steps,
        "workers": stage.workers,
        "threads_per_worker": stage.train.threads_per_worker,
        "examples_per_worker": stage.examples_per_rank,
        "texts_per_step": stage.texts,
        "chunks_per_worker_at_most": stage.chunks_per_rank(),
        "checkpoints": -(-stage.steps // stage.train.checkpoint_every),
        "parameters": stage.whole,
        "trained": stage.trained,
        "flops_at_most": stage_flops(stage, stage.max_length) if known else None,
        "memory_bytes_per_rank": memory.as_dict() if memory is not None else None,
        "deepspeed": stage_config(stage),
    }


def as_text(recipe: Recipe, document: Document, dry_run: DryRun) -> str:
    """The dry run as text."""
    lines = ["# resolved recipe, and where each value comes from", *recipe_lines(recipe, document)]
    lines += ["", "# derived: training (upper bounds: every text at max_length)"]
    for stage in stage_sizes(recipe):
        lines += _stage_lines(stage)
    lines += ["", f"# steps, below {mask(dry_run.out)}"]
    if dry_run.unreachable:
        lines.append(f"# a run from here would end with exit code 3: {mask(dry_run.unreachable)}")
    width = max((len(step.name) for step in dry_run.steps), default=0)
    lines += [f"{step.name:<{width}}  {_WHAT.get(step.what, step.what):<7} {mask(step.uri)}" for step in dry_run.steps]
    return "\n".join(lines)


def _kind(stage: StageSizes) -> str:
    return "gpu" if stage.train.gpus_per_worker else "cpu"


def _stage_lines(stage: StageSizes) -> list[str]:
    train, workers = stage.train, stage.workers
    engine = f"ZeRO-{train.engine.zero_stage}" if train.engine.type == "deepspeed" else "plain torch"
    lines = [
        f"{stage.name}: {stage.steps} steps, {workers} worker(s) x {train.threads_per_worker} thread(s), {engine}",
        f"  global batch: {stage.examples_per_rank} examples x {workers} workers x {stage.group} texts = {stage.texts} "
        f"texts; <= {stage.chunks_per_rank()} chunk(s) of {train.token_budget} tokens per worker; "
        f"{-(-stage.steps // train.checkpoint_every)} checkpoint(s)",
    ]
    if stage.model is None:
        return [*lines, "  backbone not on this machine: parameters and memory are not known yet"]
    memory = stage_memory(stage, precision=precision_of(stage), kind=_kind(stage))
    flops = stage_flops(stage, stage.max_length)
    config = stage_config(stage)
    lines += [
        f"  parameters: {stage.whole:,}, trained {stage.trained:,}; <= {flops_text(flops)}",
        f"  memory: {memory_text(memory)}",
    ]
    return [*lines, f"  DeepSpeed: {json.dumps(config)}"] if config is not None else lines


def memory_text(memory: Memory) -> str:
    """Total and parts of one rank."""
    parts = memory.as_dict()
    total = parts.pop("total")
    listed = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items())
    return f"about {total / GIB:.2f} GiB per worker (estimated): {listed}"
