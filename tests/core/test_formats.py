"""Formats live long: a sample of every version is read; what is newer is refused with what to install."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from nvembed.core import storage
from nvembed.core.formats import FormatError, check_format, own_version, stamp, with_defaults
from nvembed.core.steps import FORMAT_VERSION, ChangedRecipeError, Step, StepResult, load_artifact
from nvembed.modeling.adapters import read_adapter
from nvembed.modeling.exports.adapter_folder import describe_adapter_folder
from nvembed.modeling.folder import describe_folder, load_embedder
from nvembed.recipe.schema import RecipeError, load_recipe
from nvembed.training import checkpoint
from nvembed.training.checkpoint import Checkpoint, CheckpointStore, Identity
from nvembed.training.config import TrainConfig
from nvembed.training.worker import PlainContext
from nvembed.types import Config, UserError

ASSETS = Path(__file__).parents[1] / "assets" / "formats"


def samples(kind):
    result = sorted((ASSETS / kind).glob("v*"))
    assert result, f"no sample of {kind}: run tests/assets/formats/make.py"
    return result


def test_every_format_of_today_has_a_sample():
    from nvembed.modeling import folder
    from nvembed.modeling.exports import adapter_folder
    from nvembed.recipe.schema import RECIPE_VERSION

    today = {
        "artifact": FORMAT_VERSION,
        "checkpoint": checkpoint.FORMAT_VERSION,
        "model_folder": folder.FORMAT_VERSION,
        "adapter": adapter_folder.FORMAT_VERSION,
        "recipe": RECIPE_VERSION,
    }
    for kind, number in today.items():
        assert {path.name for path in samples(kind)} == {f"v{n}" for n in range(1, number + 1)}, kind
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 500_000


@pytest.mark.parametrize("sample", samples("artifact"), ids=lambda path: path.name)
def test_artifacts_are_read(sample):
    artifact = load_artifact(str(sample))
    assert artifact.manifest["rows"] == {"rows": 3} and artifact.manifest["metrics"] == {"mean": 0.5}
    assert storage.read_bytes(artifact.path("rows.txt")) == b"one\ntwo\nthree\n"


@pytest.mark.parametrize("sample", samples("model_folder"), ids=lambda path: path.name)
def test_model_folders_are_read(sample):
    embedder = load_embedder(sample)  # with its probe vectors computed again
    vectors = load_file(sample / "probes.safetensors")["vectors"]
    rows = json.loads((sample / "probes.json").read_text())
    result = embedder.encode([row["text"] for row in rows], prompt=[row["instruction"] for row in rows])
    assert np.abs(result - vectors).max() <= 1e-5
    assert describe_folder(sample)["prompts"] == {"query": "Instruct: x\nQuery: "}
    assert len(read_adapter(sample / "adapter").tensors) == 2


@pytest.mark.parametrize("sample", samples("adapter"), ids=lambda path: path.name)
def test_adapters_are_read(sample):
    remaining = read_adapter(sample)
    assert remaining.base["name"] == "base" and remaining.config["r"] == 2
    assert describe_adapter_folder(sample)["embedder"]["pooling"]["type"] == "latent_attention"


@pytest.mark.parametrize("sample", samples("checkpoint"), ids=lambda path: path.name)
def test_checkpoints_are_read_and_resumed_from(sample):
    state = json.loads((sample / "checkpoints" / "step-000001" / "state.json").read_text())
    config = TrainConfig.model_validate(state["config"])
    store = CheckpointStore(str(sample), Identity(config, state["inputs"], state["precision"], 1))
    assert store.preview() == 1
    result = Checkpoint(storage.join(str(sample), "checkpoints", "step-000001"))
    name = "embedder.embedding_model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert result.read("parameters", name).shape == (2, 8) and torch.equal(
        result.read("exp_avg", name), torch.zeros(2, 8)
    )


@pytest.mark.parametrize("sample", samples("recipe"), ids=lambda path: path.name)
def test_recipes_are_read(sample):
    assert load_recipe(str(sample / "recipe.yaml")) == load_recipe(str(sample / "resolved.yaml"))


# -- newer and odd ones -----------------------------------------------------------------------------------------------


def newer(record: Path) -> None:
    record.write_text(json.dumps({**json.loads(record.read_text()), "format_version": 7, "nvembed_version": "9.1"}))


def test_newer_ones_are_refused_with_what_to_install(tmp_path):
    for kind in ("artifact", "model_folder", "checkpoint", "adapter"):
        shutil.copytree(samples(kind)[-1], tmp_path / kind)
    step = tmp_path / "checkpoint" / "checkpoints" / "step-000001"
    state = json.loads((step / "state.json").read_text())
    identity = Identity(TrainConfig.model_validate(state["config"]), state["inputs"], "fp32", 1)
    reads = {
        tmp_path / "artifact" / "manifest.json": lambda: load_artifact(str(tmp_path / "artifact")),
        tmp_path / "model_folder" / "nvembed.json": lambda: load_embedder(tmp_path / "model_folder"),
        tmp_path / "adapter" / "base.json": lambda: read_adapter(tmp_path / "adapter"),
        tmp_path / "adapter" / "adapter.json": lambda: describe_adapter_folder(tmp_path / "adapter"),
        step / "manifest.json": lambda: CheckpointStore(str(tmp_path / "checkpoint"), identity).newest(PlainContext()),
    }
    for record, read in reads.items():
        read()
        newer(record)
        message = r"format version 7, made by nvembed 9\.1; nvembed \S+ reads 1\. Run: pip install 'nvembed>=9\.1'"
        with pytest.raises(UserError, match=message):
            read()


def test_a_newer_recipe_is_refused_whole(tmp_path):
    text = (samples("recipe")[-1] / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text("version: 2\nunheard_of: 1\n" + text)
    with pytest.raises(RecipeError, match=r"1 problem\n.*version: 2: this recipe is for a newer nvembed") as error:
        load_recipe(str(tmp_path / "recipe.yaml"))
    assert "unheard_of" not in str(error.value)
    for odd in ("one", "0"):
        (tmp_path / "recipe.yaml").write_text(f"version: {odd}\n{text}")
        with pytest.raises(RecipeError, match="version"):
            load_recipe(str(tmp_path / "recipe.yaml"))
    (tmp_path / "recipe.yaml").write_text(f"version: 1\n{text}")
    assert load_recipe(str(tmp_path / "recipe.yaml")).version == 1
    assert yaml.safe_load((samples("recipe")[0] / "resolved.yaml").read_text())["version"] == 1


def test_numbers():
    assert check_format(stamp(3), "x", newest=3) == 3 and stamp(3)["nvembed_version"] == own_version()
    assert check_format({"format_version": 2}, "x", newest=3) == 2
    with pytest.raises(FormatError, match=r"made by a newer nvembed; .* reads 2 to 3\. Run: pip install '--upgrade"):
        check_format({"format_version": 4}, "x", newest=3, oldest=2)
    with pytest.raises(FormatError, match=r"format version 1; .* reads 2 to 3\. Build it again"):
        check_format({"format_version": 1}, "x", newest=3, oldest=2)
    for odd in (None, "1", 1.0, True, 0, -1):
        with pytest.raises(FormatError, match="no nvembed wrote"):
            check_format({"format_version": odd}, "x", newest=3)


class Old(Config):
    rows: int = 3


class Grown(Config):
    rows: int = 3
    colour: str = "red"


def test_an_output_is_not_another_one_for_lacking_a_new_key(tmp_path):
    built = []

    def build(config, inputs, work):
        built.append(config)
        return StepResult()

    before = Step("sample", 1, build).run(Old(), {}, str(tmp_path / "a"))
    after = Step("sample", 1, build).run(Grown(), {}, str(tmp_path / "a"))
    assert len(built) == 1 and after.manifest_hash == before.manifest_hash
    with pytest.raises(ChangedRecipeError, match=r'config\.colour: "red" -> "blue"'):
        Step("sample", 1, build).run(Grown(colour="blue"), {}, str(tmp_path / "a"))
    with pytest.raises(ChangedRecipeError, match=r'config\.colour: "red" -> \(none\)'):
        Step("sample", 1, build).run(Old(), {}, str(tmp_path / "b")) and None
        Step("sample", 1, build).run(Grown(), {}, str(tmp_path / "c"))
        Step("sample", 1, build).run(Old(), {}, str(tmp_path / "c"))
    assert with_defaults({"config": {"x": 1}}, Old) == {"config": {"x": 1}} and with_defaults({}, Old) == {}
