"""The plan of a recipe on a machine, as plain values and as text: the output of `nvembed plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nvembed.plan.corpora import Rows
from nvembed.plan.hardware import CORE, Hardware
from nvembed.plan.hours import StepTime, step_times, train_seconds
from nvembed.plan.memory import GIB, Memory, fits, stage_memory
from nvembed.plan.mining import MinePlan, plan_mining
from nvembed.plan.mining import as_json as mining_json
from nvembed.plan.mining import as_text as mining_text
from nvembed.plan.sizes import StageSizes, stage_sizes
from nvembed.plan.work import flops_text, size_text, stage_flops, stage_storage, stage_tokens, time_text
from nvembed.recipe.schema import Recipe
from nvembed.retrieval.config import EncodeConfig

FILL = 0.5  # mean tokens of a text over max_length: 0.47 on the quickstart


@dataclass(frozen=True)
class StageReport:
    """One stage: numbers at the assumed length of texts, memory and the `_most` numbers at `max_length`."""

    sizes: StageSizes
    tokens: float
    tokens_most: float
    flops: float
    flops_most: float
    memory: Memory
    memory_mean: Memory
    fits: bool
    storage: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The plan of a recipe on a machine.

    Attributes:
        stages: those whose backbone is known.
        unknown: names of the others.
        steps: every pipeline step with its seconds.
        mining, mining_again: what the `mine` and `mine_again` steps encode and search; None without such a step.
        notes: limits of the numbers, and settings to change.
    """

    recipe: Recipe
    hardware: Hardware
    fill: float
    stages: Sequence[StageReport]
    unknown: Sequence[str]
    steps: Sequence[StepTime]
    storage: dict[str, float]
    notes: Sequence[str]
    mining: MinePlan | None = None
    mining_again: MinePlan | None = None

    @property
    def seconds(self) -> float:
        """Seconds of all steps whose work is known."""
        return sum(step.seconds or 0.0 for step in self.steps)

    @property
    def cost(self) -> float | None:
        """Money for `seconds` of the whole machine; None without a price."""
        price = self.hardware.price_per_hour
        return None if price is None else price * self.seconds / 3600


def plan_recipe(recipe: Recipe, hardware: Hardware, *, fill: float = FILL, rows: Rows | None = None) -> Plan:
    """Plan a recipe on a machine.

    Args:
        fill: mean tokens of a text over `max_length`.
        rows: data set -> (queries, documents) that are mined, where the sources have no caps.

    Raises:
        UserError: `rows` names a set that mining does not search.
    """
    sizes = stage_sizes(recipe)
    known = [stage for stage in sizes if stage.model is not None]
    reports = [_report(stage, hardware, fill) for stage in known]
    length = fill * recipe.initialise.embedder.text.max_length if recipe.initialise is not None else 0.0
    mining = plan_mining(recipe, hardware, length, rows) if recipe.stage_1 is not None and length else None
    trained = sizes[0].model if recipe.mine_again and sizes else None
    mining_again = plan_mining(recipe, hardware, length, rows, trained) if mining is not None and trained else None
    steps = step_times(recipe, sizes, hardware, fill, mining, mining_again)
    return Plan(
        recipe=recipe,
        hardware=hardware,
        fill=fill,
        stages=reports,
        unknown=[stage.name for stage in sizes if stage.model is None],
        steps=steps,
        storage=_storage(recipe, reports, [plan for plan in (mining, mining_again) if plan is not None]),
        notes=[*_notes(recipe, known, hardware, steps), *(mining.notes if mining is not None else ())],
        mining=mining,
        mining_again=mining_again,
    )


def precision_of(stage: StageSizes) -> str:
    """`auto` is bf16 on every machine of the catalogue."""
    return "fp32" if stage.train.precision == "fp32" else "bf16"


def _report(stage: StageSizes, hardware: Hardware, fill: float) -> StageReport:
    length, precision = fill * stage.max_length, precision_of(stage)
    memory = stage_memory(stage, precision=precision, kind=hardware.kind)
    return StageReport(
        sizes=stage,
        tokens=stage_tokens(stage, length),
        tokens_most=stage_tokens(stage, stage.max_length),
        flops=stage_flops(stage, length),
        flops_most=stage_flops(stage, stage.max_length),
        memory=memory,
        memory_mean=stage_memory(stage, precision=precision, kind=hardware.kind, length=length),
        fits=fits(memory, stage.workers, hardware),
        storage=stage_storage(stage, length),
        seconds=train_seconds(stage, hardware, length),
    )


def _storage(recipe: Recipe, stages: Sequence[StageReport], mining: Sequence[MinePlan]) -> dict[str, float]:
    """Bytes below the output when everything is done, and the checkpoints on top while a stage runs."""
    teachers = [stage for stage in stages if stage.sizes.name != "student"]
    students = [stage for stage in stages if stage.sizes.name == "student"]
    sizes = {
        "streams": sum(stage.storage["stream"] for stage in stages),
        "model folders": sum(stage.storage["model"] for stage in stages)
        + sum(group[0].storage["model"] for group in (teachers, students) if group),  # before the first stage
        "registry": sum(group[-1].storage["model"] for group in (teachers, students) if group)
        if recipe.register.enabled
        else 0.0,
        "checkpoints while a stage runs": max((stage.storage["checkpoints"] for stage in stages), default=0.0),
    }
    if (
        recipe.teacher_embeddings is not None
        and recipe.teacher_embeddings.max_texts
        and students
        and students[0].sizes.model is not None
    ):
        dim = students[0].sizes.model.shape.hidden
        stream = students[0].sizes.steps * students[0].sizes.batch
        sizes["teacher vectors"] = 4.0 * dim * (recipe.teacher_embeddings.max_texts + stream)
    working = [plan.text_bytes + sum(model.shard_bytes for model in plan.models) for plan in mining if plan.seconds]
    if working:
        sizes["texts and vectors while mining"] = max(working)
    return sizes


def pools(recipe: Recipe) -> dict[str, EncodeConfig]:
    """Settings of every encoding pool of a recipe, by their place in it."""
    settings = {}
    if recipe.initialise is not None:
        settings = {
            "mine.encode": recipe.mine.encode,
            "baselines.evaluate.encode": recipe.baselines.evaluate.encode,
            "evaluate.encode": recipe.evaluate.encode,
        }
    if recipe.teacher_embeddings is not None:
        settings["teacher_embeddings.encode"] = recipe.teacher_embeddings.encode
    if recipe.student is not None:
        settings["student.evaluate.encode"] = recipe.student.evaluate.encode
    return settings


def _pool_notes(recipe: Recipe, hardware: Hardware) -> list[str]:
    """Notes on pools that run on cores although there are GPUs, or the reverse."""
    gpus_per_actor = {name: pool.gpus_per_actor for name, pool in pools(recipe).items()}
    if hardware.kind == "gpu":
        cores = [name for name, gpus in gpus_per_actor.items() if not gpus]
        advice = f"planned on cores like {CORE.name}'s ({CORE.device}), not on GPUs: --set {{}}.gpus_per_actor=1"
        return [f"actors of {', '.join(cores)} use no GPU; {advice.format(cores[0])}"] if cores else []
    gpus = [name for name, number in gpus_per_actor.items() if number]
    return [f"actors of {', '.join(gpus)} need GPUs, {hardware.name} has none; planned on its cores"] if gpus else []


def _notes(recipe: Recipe, stages: Sequence[StageSizes], hardware: Hardware, steps: Sequence[StepTime]) -> list[str]:
    notes = [f"utilisation {hardware.mfu:g} of {hardware.peak_tflops:g} TFLOP/s a device: {hardware.mfu_source}"]
    if hardware.price_per_hour is not None:
        notes.append(
            f"price {hardware.price_per_hour:g} an hour for the whole machine: {hardware.price_source}; --price"
        )
    if hardware.kind == "gpu":
        notes.append(
            "measured, on one H100: steps of a decoder of 28 layers x 1,024 with LoRA, encoding by it and by a net of "
            "6 x 384, exact search; memory, wider models, several GPUs and whole runs are arithmetic"
        )
    notes += _pool_notes(recipe, hardware)
    for stage in stages:
        if stage.workers > hardware.devices:
            notes.append(f"{stage.name} needs {stage.workers} workers, {hardware.name} has {hardware.devices} devices")
        if hardware.kind == "gpu" and stage.workers < hardware.devices:
            more = f"{stage.name}.train.num_workers={hardware.devices}"
            notes.append(f"{stage.name} uses {stage.workers} of {hardware.devices} devices; --set {more} uses all")
        if hardware.kind == "gpu" and not stage.train.gpus_per_worker:
            notes.append(
                f"{stage.name} trains on CPUs; planned with a GPU each: --set {stage.name}.train.gpus_per_worker=1"
            )
    missing = [step.name for step in steps if step.seconds is None]
    if missing:
        why = "the recipe does not cap the data (or the model is not here)" + (
            "; --rows for mine" if "mine" in missing else ""
        )
        notes.append(f"hours without {', '.join(missing)}: {why}")
    return notes


def with_price(hardware: Hardware, price: float | None, mfu: float | None) -> Hardware:
    """The machine with another price or utilisation."""
    changes: dict[str, Any] = {}
    if price is not None:
        changes |= {"price_per_hour": price, "price_source": "--price"}
    if mfu is not None:
        changes |= {"mfu": mfu, "mfu_source": "--mfu", "full_width": None, "launch_seconds": 0.0}
    return hardware.model_copy(update=changes)


# -- shown ------------------------------------------------------------------------------------------------------------


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; bytes, seconds, operations."""
    return {
        "recipe": plan.recipe.name,
        "hardware": plan.hardware.model_dump(mode="json"),
        "tokens_per_text_over_max_length": plan.fill,
        "stages": {report.sizes.name: stage_json(report) for report in plan.stages},
        "unknown_backbone": list(plan.unknown),
        "mining": mining_json(plan.mining) if plan.mining is not None else None,
        "mining_again": mining_json(plan.mining_again) if plan.mining_again is not None else None,
        "steps": [asdict(step) for step in plan.steps],
        "storage_bytes": plan.storage,
        "seconds": plan.seconds,
        "cost": plan.cost,
        "notes": list(plan.notes),
    }


def stage_json(report: StageReport) -> dict[str, Any]:
    """One stage as plain values."""
    sizes = report.sizes
    return {
        "steps": sizes.steps,
        "workers": sizes.workers,
        "texts_per_step": sizes.texts,
        "chunks_per_worker": sizes.chunks_per_rank(),
        "parameters": sizes.model.parameters if sizes.model is not None else None,
        "trained": sizes.trained,
        "tokens": report.tokens,
        "tokens_most": report.tokens_most,
        "flops": report.flops,
        "flops_most": report.flops_most,
        "memory_bytes_per_rank": report.memory.as_dict(),
        "memory_bytes_per_rank_mean_texts": report.memory_mean.as_dict(),
        "fits": report.fits,
        "storage_bytes": report.storage,
        "seconds": report.seconds,
    }


def as_text(plan: Plan) -> str:
    """The plan as text."""
    hardware = plan.hardware
    lines = [
        f"{plan.recipe.name} on {hardware.name}: {hardware.devices} x {hardware.device}",
        f"texts of {plan.fill:g} x max_length tokens on average (--fill), memory for texts that all have max_length",
    ]
    if plan.mining is not None:
        lines += ["", *mining_text(plan.mining)]
    if plan.mining_again is not None:
        lines += ["", *mining_text(plan.mining_again, "mine_again")]
    for report in plan.stages:
        lines += ["", *stage_text(report, hardware)]
    lines += [f"\n{name}: the backbone's sizes are not known on this machine" for name in plan.unknown]
    lines += ["", "storage below the output:"]
    lines += [f"  {name:<32}{size_text(value):>10}" for name, value in plan.storage.items()]
    lines += ["", "time:"]
    for step in plan.steps:
        seconds = "not known" if step.seconds is None else time_text(step.seconds)
        lines.append(f"  {step.name:<24}{seconds:>12}  {step.why}".rstrip())
    lines.append(f"  {'together':<24}{time_text(plan.seconds):>12}" + _cost_text(plan))
    return "\n".join([*lines, "", *(f"note: {note}" for note in plan.notes)])


def _cost_text(plan: Plan) -> str:
    cost = plan.cost
    return "" if not cost else f"  = {plan.seconds / 3600:,.1f} h, cost {cost:,.2f}"


def stage_text(report: StageReport, hardware: Hardware | None = None) -> list[str]:
    """One stage as text."""
    sizes, memory = report.sizes, report.memory
    assert sizes.model is not None
    parts = memory.as_dict()
    total = parts.pop("total")
    capacity = ""
    if hardware is not None:
        have = f"{hardware.memory_gib:g} GiB" + (" of the machine" if hardware.kind == "cpu" else "")
        capacity = f", fits into {have}" if report.fits else f", DOES NOT FIT into {have}"
    return [
        f"{sizes.name}: {sizes.model.parameters:,} parameters, {sizes.trained:,} trained, {sizes.workers} worker(s)",
        f"  {sizes.steps:,} steps x {sizes.texts:,} texts, {report.tokens:,.0f} tokens "
        f"(at most {report.tokens_most:,.0f}); "
        f"{flops_text(report.flops)} (at most {flops_text(report.flops_most)})",
        f"  memory of a rank: {total / GIB:.2f} GiB{capacity}",
        "    " + ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items()),
    ]
