"""What a recipe asks of a cluster: places, packages and models per node (layer 6). Pure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from nvembed.data.config import BeirSource, FilesSource
from nvembed.preflight.packages import all_sources, needed_packages
from nvembed.recipe.schema import Recipe
from nvembed.retrieval.config import EncodeConfig, RetrieverConfig
from nvembed.training.config import TrainConfig


@dataclass(frozen=True)
class Pool:
    """Processes that have to stand at the same time: a stage's workers or a step's actors."""

    section: str
    count: int
    cpus: float
    gpus: float
    bf16: bool = False


@dataclass(frozen=True)
class Needs:
    """What a recipe asks for.

    Attributes:
        pools: what has to be placed, largest first by no order.
        node_models: models that every node opens: `(section, name, revision)`.
        node_packages: packages that every node needs, each with the sections that want it.
        driver_packages: packages that only the driver's node needs.
        driver_paths: files and folders that only the driver reads: `(section, uri)`.
    """

    pools: list[Pool] = field(default_factory=list)
    node_models: list[tuple[str, str, str | None]] = field(default_factory=list)
    node_packages: dict[str, list[str]] = field(default_factory=dict)
    driver_packages: dict[str, list[str]] = field(default_factory=dict)
    driver_models: list[tuple[str, str, str | None]] = field(default_factory=list)
    driver_paths: list[tuple[str, str]] = field(default_factory=list)


ON_NODES = ("mine.", "baselines.reference")  # opened by actors; data and backbones are read by the driver


def needs_of(recipe: Recipe) -> Needs:
    """Everything the recipe's stages ask for."""
    packages = needed_packages(recipe)
    on_nodes = {name: wants for name, wants in packages.items() if any(want.startswith(ON_NODES) for want in wants)}
    return Needs(
        pools=list(_pools(recipe)),
        node_models=list(_models(recipe)),
        node_packages=on_nodes,
        driver_packages={name: wants for name, wants in packages.items() if name not in on_nodes},
        driver_models=list(_backbone(recipe)),
        driver_paths=list(_sources(recipe)),
    )


def _pools(recipe: Recipe) -> Iterator[Pool]:
    for name, stage in (("stage_1", recipe.stage_1), ("stage_2", recipe.stage_2), ("student", recipe.student)):
        if stage is not None:
            yield _workers(f"{name}.train", stage.train)
    if recipe.stage_1 is not None:
        yield _actors("mine.encode", recipe.mine.encode)
        yield _actors("evaluate.encode", recipe.evaluate.encode)
    if recipe.teacher_embeddings is not None:
        yield _actors("teacher_embeddings.encode", recipe.teacher_embeddings.encode)


def _workers(section: str, train: TrainConfig) -> Pool:
    return Pool(
        section, train.num_workers, float(train.threads_per_worker), train.gpus_per_worker, train.precision == "bf16"
    )


def _actors(section: str, encode: EncodeConfig) -> Pool:
    return Pool(section, encode.actors, encode.cpus_per_actor, encode.gpus_per_actor, encode.precision == "bf16")


def _models(recipe: Recipe) -> Iterator[tuple[str, str, str | None]]:
    if recipe.stage_1 is None:
        return
    named: tuple[tuple[str, RetrieverConfig], ...] = (
        *((f"mine.{place}", model) for place, model in recipe.mine.embedders()),
        ("baselines.reference", recipe.baselines.reference),
    )
    for section, model in named:
        if model.type == "pretrained":
            yield section, _place(model.name), model.revision
    if (cross := recipe.mine.cross_encoder) is not None:
        yield "mine.candidate_filter.model", _place(cross.name), cross.revision


def _backbone(recipe: Recipe) -> Iterator[tuple[str, str, str | None]]:
    if recipe.initialise is not None and recipe.initialise.backbone.type == "pretrained":
        backbone = recipe.initialise.backbone
        yield "initialise.backbone", _place(backbone.name), backbone.revision
    if recipe.teacher is not None and not recipe.teacher.startswith("models:/"):  # never a hub name
        yield "teacher", recipe.teacher if "://" in recipe.teacher else os.path.abspath(recipe.teacher), None


def _place(name: str) -> str:
    """A local folder by its absolute path: workers have another working directory."""
    return os.path.abspath(name) if "://" not in name and os.path.isdir(name) else name


def _sources(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for section, source in all_sources(recipe):
        if isinstance(source, BeirSource):
            yield section, source.uri
        elif isinstance(source, FilesSource):
            yield from ((section, uri) for uri in source.uris)
