"""The hash chain: collected from real published steps, moved with them, and its cuts and changes detected."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from nvembed.core import storage
from nvembed.core.steps import load_artifact
from nvembed.modeling.card import CardFacts, model_card
from nvembed.modeling.config import EmbedderConfig
from nvembed.modeling.origin import folder_content, model_licence
from nvembed.registry import provenance as chains


@pytest.fixture
def traced(kit: Any) -> tuple[dict[str, Any], str]:
    model = kit.model("a")
    provenance = chains.trace(model, kit.scores(model, 0.5))
    return provenance, folder_content(str(storage.local_path(model.path("model"))))


def test_the_chain_leads_from_the_data_to_the_folder(traced: Any) -> None:
    provenance, content = traced
    assert chains.chain_problems(provenance, content) == []
    kinds = [provenance["nodes"][step]["kind"] for _, step in chains.chain(provenance)]
    assert kinds == ["prepare", "initialise", "mine", "stream", "train"]
    assert sorted(chains.evaluated_datasets(provenance)) == ["cwe", "hpo"]


def test_licences_are_carried_through(traced: Any) -> None:
    rows = {(row["kind"], row["name"]): row["licence"] for row in chains.licences(traced[0])}
    assert rows == {
        ("data set", "cwe"): "licence of cwe",
        ("data set", "hpo"): "licence of hpo",
        ("backbone", "HuggingFaceTB/SmolLM2-135M-Instruct"): "Apache-2.0",
        ("mining model", "sentence-transformers/all-MiniLM-L6-v2"): "Apache-2.0",
    }


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", "mine-{tag}: its hash is not that of its contents"),
        ("files", "train-a-{tag}: its hash is not that of its contents"),
        ("cut", "its input mine is gone"),
        ("scored", "scored another model"),
        ("folder", "is not the one that was registered"),
    ],
)
def test_a_changed_chain_is_detected(traced: Any, what: str, message: str) -> None:
    provenance, content = copy.deepcopy(traced[0]), traced[1]
    by_kind = {node["kind"]: (key, node) for key, node in provenance["nodes"].items()}
    if what == "config":
        by_kind["mine"][1]["config"]["seed"] = 1
    elif what == "files":
        by_kind["train"][1]["files"]["model/note.txt"]["xxh3_128"] = "0" * 32
    elif what == "cut":
        del provenance["nodes"][by_kind["mine"][0]]
    elif what == "scored":
        by_kind["evaluate"][1]["inputs"]["model"] = by_kind["initialise"][0]
    else:
        content = "another"
    tag = by_kind["train"][1]["step"].rsplit("-", 1)[1]
    problems = chains.chain_problems(provenance, content)
    assert any(message.format(tag=tag) in problem for problem in problems), problems


def test_no_chain_and_another_format_are_said() -> None:
    assert "no provenance.json" in chains.chain_problems(None, None)[0]
    newer = {"format_version": 9, "nvembed_version": "9.1"}
    assert "pip install 'nvembed>=9.1'" in chains.chain_problems(newer, None)[0]


def test_a_moved_output_still_has_its_chain(kit: Any, tmp_path: Path) -> None:
    model = kit.model("a")
    scores = kit.scores(model, 0.5)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for step in Path(kit.out).glob("*-*"):
        shutil.move(step, moved / step.name)
    again = [load_artifact(str(moved / Path(artifact.uri).name)) for artifact in (model, scores)]
    assert chains.chain_problems(chains.trace(*again), None) == []


def test_a_step_built_again_breaks_the_chain(kit: Any) -> None:
    model = kit.model("a")
    scores = kit.scores(model, 0.5)
    mined = next(Path(kit.out).glob("mine-*"))
    shutil.rmtree(mined)
    kit.step(mined.name, "mine", {"seed": 5}, prepare=kit.prepare())
    assert any("input mine is gone" in problem for problem in chains.chain_problems(chains.trace(model, scores), None))


def test_an_imported_models_card_carries_its_licences_on(kit: Any) -> None:
    rows = [
        {"kind": "data set", "name": "web", "licence": "CC-BY-4.0"},
        {"kind": "backbone", "name": "b/c", "licence": "MIT"},
    ]
    facts = CardFacts("t", {}, {}, "test", rows)

    def build(uri: str) -> None:
        Path(uri, "model").mkdir()
        Path(uri, "model", "README.md").write_text(model_card(EmbedderConfig(), 8, 100, {}, None, facts))

    imported = kit.step("teacher", "import_model", {"reference": "models:/t@champion"}, build)
    prepared = kit.prepare()
    stream = kit.step(
        "stream",
        "distill_stream",
        {},
        teacher_embeddings=kit.step("teacher_embeddings", "teacher_embeddings", {}, prepare=prepared),
        model=imported,
    )
    model = kit.step("train_student", "train", {}, stream=stream, model=imported)
    provenance = chains.trace(model, kit.scores(model, 0.5))
    assert chains.imported(provenance) == ["models:/t@champion"]
    carried = chains.licences(provenance)
    assert all(row in carried for row in rows) and {row["name"] for row in carried} == {"cwe", "hpo", "web", "b/c"}
    assert chains.chain_problems(provenance, None) == []


def test_a_models_own_card_is_asked_for_its_licence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nbase_model: x/y\n---\n# a model\n")
    licence = model_licence({"type": "pretrained", "name": str(tmp_path)})
    assert licence is not None and (licence.name, licence.licence) == ("x/y", "cc-by-nc-4.0")
    unknown = model_licence({"type": "pretrained", "name": "some/model"})
    assert unknown is not None and unknown.licence == "unknown"
    assert model_licence({"type": "random"}) is None
