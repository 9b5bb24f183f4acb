"""Seconds of every pipeline step: training from its operations, encoding from how many texts the recipe allows.

Checked against one run, the quickstart on 2 cores (`tests/benchmarks/plan_against_measured.py`, a test:
`tests/plan/test_hours.py`). On GPUs a training step of one small decoder and encoding were measured on one H100
(`hardware.py`, `encoding.py`), no run as a whole. Actors without a GPU are planned on cores. How many texts a set
has is in the recipe only where it is capped; without a cap a step's seconds are None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nvembed.plan.corpora import Rows, searched_sets, source_kind
from nvembed.plan.encoding import EncoderSizes, encode_seconds, encoder_sizes
from nvembed.plan.hardware import Hardware
from nvembed.plan.mining import MinePlan
from nvembed.plan.sizes import Model, StageSizes
from nvembed.plan.work import compute_seconds, launch_seconds, stage_flops, training_devices, update_seconds
from nvembed.recipe.schema import Recipe
from nvembed.retrieval.config import EncodeConfig

PREPARE_SECONDS, INITIALISE_SECONDS, SMALL_SECONDS = 20.0, 25.0, 2.0  # of the quickstart, whatever the hardware
WRITE_BYTES_PER_SECOND = 500e6  # model folders and checkpoints
DEV_VARIANTS = 4  # on dev the untrained backbone runs once for each variant, on the whole sets as the best of them


@dataclass(frozen=True)
class StepTime:
    """Seconds of a pipeline step; None where the recipe does not determine its work."""

    name: str
    seconds: float | None
    why: str = ""


@dataclass(frozen=True)
class Texts:
    """Upper bounds of the texts that steps encode, by the recipe's caps; None: no cap."""

    train: int | None
    mine: int | None
    evaluate: int | None
    dev: int


def count_texts(recipe: Recipe, rows: Rows | None = None) -> Texts:
    """Texts from the sources' caps (`max_documents`, `max_train`, `max_test`), of mining also from `rows`."""
    caps = recipe.baselines
    train, evaluate, dev = list[int | None](), list[int | None](), 0
    for source in recipe.prepare.sources:
        kind = source_kind(source)
        train.append(source.max_train or source.max_documents)
        if kind == "retrieval":
            evaluate.append(_plus(source.max_documents, source.max_test))
            dev += caps.dev_documents + caps.dev_queries
        else:
            pair = 2 if kind == "similarity" else 1
            evaluate.append(None if source.max_test is None else pair * source.max_test)
            dev += pair * caps.dev_queries
    return Texts(_sum(train), _sum(corpus.rows for corpus in searched_sets(recipe, rows)), _sum(evaluate), dev)


def _plus(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


def _sum(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def train_seconds(stage: StageSizes, hardware: Hardware, length: float) -> float:
    """Seconds of a training step: start, arithmetic, updates, checkpoints, the model folder."""
    assert stage.trained is not None and stage.model is not None
    devices = training_devices(stage.workers, stage.train.threads_per_worker, hardware)
    steps = compute_seconds(stage_flops(stage, length), devices, stage.model.shape.hidden, hardware)
    steps += launch_seconds(stage, hardware, length) + update_seconds(stage, hardware)
    saves = -(-stage.steps // stage.train.checkpoint_every) * 12.0 * stage.trained + 4.0 * stage.model.parameters
    return hardware.start_seconds + steps + saves / WRITE_BYTES_PER_SECOND


@dataclass(frozen=True)
class _Encoding:
    """Encoding on a machine, texts of `length` tokens."""

    hardware: Hardware
    length: float

    def __call__(self, texts: int | None, model: Model | EncoderSizes | None, config: EncodeConfig) -> float | None:
        """Seconds."""
        if texts is None or model is None:
            return None
        encoder = EncoderSizes.of(model) if isinstance(model, Model) else model
        return encode_seconds(encoder, texts * self.length, self.length, config, self.hardware)


def step_times(
    recipe: Recipe,
    stages: Iterable[StageSizes],
    hardware: Hardware,
    share: float,
    mining: MinePlan | None = None,
    mining_again: MinePlan | None = None,
) -> list[StepTime]:
    """Every pipeline step that a recipe can have, in order.

    Args:
        share: mean tokens of a text, as a share of `max_length`.
        mining, mining_again: the plans of the `mine` and `mine_again` steps, if there are such.
    """
    by_name = {stage.name: stage for stage in stages}
    rows = {c.name: (c.queries, c.documents) for c in mining.corpora if c.queries and c.documents} if mining else {}
    texts = count_texts(recipe, rows)
    start = hardware.start_seconds
    times = [StepTime("prepare", PREPARE_SECONDS if texts.train is not None else None, "reading; grows with the data")]

    def add(name: str, *seconds: float | None, why: str = "") -> None:
        known = [part for part in seconds if part is not None]
        times.append(StepTime(name, sum(known) if len(known) == len(seconds) else None, why))

    first = by_name.get("stage_1")
    if first is not None and first.model is not None:
        copied = 2 * 4.0 * first.model.parameters / WRITE_BYTES_PER_SECOND
        add("initialise", INITIALISE_SECONDS + copied, why="reading the backbone")
    if mining is not None:
        models = f" by {len(mining.models)} models" if len(mining.models) > 1 else ""
        add("mine", mining.seconds, why=f"{_count(texts.mine)} texts{models}, and their search")
    if first is not None and first.model is not None:
        encoding = _Encoding(hardware, share * first.max_length)
        reference = encoder_sizes(recipe.baselines.reference)
        for name in ("stage_1", "stage_2"):
            if name == "stage_2" and mining_again is not None:
                add("mine_again", mining_again.seconds, why="the same texts by the stage-1 model")
            if name in by_name:
                _train(add, by_name[name], hardware, share)
        encode = recipe.baselines.evaluate.encode
        variants = encoding(DEV_VARIANTS * texts.dev + (texts.evaluate or 0), first.model, encode)
        add(
            "baselines", 2 * start, encoding(texts.evaluate, reference, encode), variants if texts.evaluate else None,
            why=f"{_count(texts.evaluate)} texts by the reference, and by the untrained backbone",
        )  # fmt: skip
        add("evaluate_teacher", start, encoding(texts.evaluate, first.model, recipe.evaluate.encode))
    _student(add, recipe, by_name, hardware, share, texts)
    return times


def _student(
    add: Callable[..., None],
    recipe: Recipe,
    by_name: dict[str, StageSizes],
    hardware: Hardware,
    share: float,
    texts: Texts,
) -> None:
    small, teacher = by_name.get("student"), by_name.get("stage_1")
    if small is None or small.model is None or recipe.teacher_embeddings is None or recipe.student is None:
        return
    start, encoding = hardware.start_seconds, _Encoding(hardware, share * small.max_length)
    taught = recipe.teacher_embeddings.max_texts or texts.mine
    evaluate = recipe.student.evaluate.encode
    add(
        "teacher_embeddings",
        start,
        encoding(taught, teacher.model if teacher else None, recipe.teacher_embeddings.encode),
    )
    add("evaluate_student_init", start, encoding(texts.evaluate, small.model, evaluate))
    _train(add, small, hardware, share)
    add("evaluate_student", start, encoding(texts.evaluate, small.model, evaluate))
    add("compare_student", 0.8 * start, why="repeated encoding of a few hundred texts")


def _train(add: Callable[..., None], stage: StageSizes, hardware: Hardware, share: float) -> None:
    add(f"stream_{stage.name}", SMALL_SECONDS, why="of a small run; grows with the texts, which was not measured")
    length = share * stage.max_length
    add(f"train_{stage.name}", train_seconds(stage, hardware, length), why=f"{stage.steps:,} steps")


def _count(number: int | None) -> str:
    return "an unknown number of" if number is None else f"about {number:,}"
