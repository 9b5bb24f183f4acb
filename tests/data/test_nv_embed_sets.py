"""The training sets of NV-Embed v1 and v2 (`nv_embed_sets.yaml`), and the two recipes that name them all."""

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field

from nvembed.recipe.schema import load_recipe
from nvembed.text.instructions import CATALOGUE
from nvembed.types import Config

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"


class TrainingSet(Config):
    """One set, and what is known of it from where; the head of the YAML file says what the fields mean."""

    name: str
    versions: tuple[Literal[1, 2], ...]
    stages: tuple[Literal[1, 2], ...]
    task: Literal["retrieval", "classification", "clustering", "sts"]
    hub: str | None
    hub_source: str
    licence: str
    licence_source: str
    instruction: str
    instruction_source: str
    samples: int = Field(ge=1)
    samples_verified: bool
    positives_from: dict[Literal[1, 2], Literal["labels", "examples"]] | None = None
    reader: dict[str, Any]

    def source(self, version: Literal[1, 2], max_test: int) -> dict[str, Any]:
        """The set as an entry of `prepare.sources`, capped at its sample count."""
        entry = {"name": self.name, **self.reader, "licence": self.licence, "instruction": self.instruction}
        if self.task != "retrieval":
            entry["task"] = self.task
        if self.positives_from is not None:
            entry["positives_from"] = self.positives_from[version]
        return {**entry, "max_train": self.samples, "max_test": max_test}


LISTED = yaml.safe_load(Path(__file__).with_name("nv_embed_sets.yaml").read_text(encoding="utf-8"))["sets"]
SETS = tuple(TrainingSet.model_validate(row) for row in LISTED)


def test_every_set_says_what_is_known_of_it() -> None:
    names = [item.name for item in SETS]
    assert len(set(names)) == len(names) == 42
    tasks = [item.task for item in SETS if 2 in item.versions]
    assert [tasks.count(task) for task in ("retrieval", "sts", "classification", "clustering")] == [16, 3, 12, 11]
    for item in SETS:
        assert item.instruction in CATALOGUE
        assert (item.hub is None) == (item.hub_source == "") and (item.licence == "unknown") == (
            not item.licence_source
        )
        assert item.stages == ((1, 2) if item.task == "retrieval" else (2,))
        assert (item.positives_from is None) == (item.task in ("retrieval", "sts"))


def test_the_versions_differ_as_the_papers_say() -> None:
    only_v2 = {item.name for item in SETS if item.versions == (2,)}
    assert only_v2 == {
        "hover", "scifact", "nfcorpus", "miracl", "mrtydi", "amazon_polarity", "mtop_domain", "massive_intent",
        "massive_scenario", "reddit", "reddit_p2p", "stackexchange_titles", "stackexchange_p2p",
    }  # fmt: skip
    by_example = {item.name for item in SETS if item.positives_from and item.positives_from[2] == "examples"}
    multi_class = {"emotion", "massive_intent", "massive_scenario", "mtop_domain", "mtop_intent"}
    assert by_example == multi_class | {item.name for item in SETS if item.task == "clustering"}
    assert all(item.positives_from[1] == "labels" for item in SETS if item.positives_from)


@pytest.mark.parametrize("version", [1, 2])
def test_a_recipe_names_every_set_of_its_version_as_the_list_has_it(version: Literal[1, 2]) -> None:
    recipe = load_recipe(str(RECIPES / f"nv_embed_v{version}_7b.yaml"))
    wanted = [item for item in SETS if version in item.versions]
    assert [source.name for source in recipe.prepare.sources] == [item.name for item in wanted]
    for source, item in zip(recipe.prepare.sources, wanted, strict=True):
        assert source == type(source).model_validate(item.source(version, max_test=1000))
    for number, stage in ((1, recipe.stage_1), (2, recipe.stage_2)):
        assert stage is not None
        assert set(stage.stream.weights) == {item.name for item in wanted if number in item.stages}
    assert not recipe.stage_2.train.objective.in_batch and recipe.stage_1.train.objective.in_batch
