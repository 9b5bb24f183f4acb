"""The model folder: reloads to the same vectors, and refuses what is damaged, foreign or computed differently."""

import json
import os
import shutil

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nvembed.modeling.config import LastTokenConfig, LatentAttentionConfig, MeanConfig
from nvembed.modeling.folder import describe_folder, load_embedder, save_embedder
from nvembed.text.instructions import instruction_prefix
from nvembed.types import UserError

PREFIX = instruction_prefix("web_search")
TEXTS = ["how do I sort a list", "?", "heap overflow " * 30, "Größe 東京"]
PROMPTS = {"query": PREFIX}


@pytest.fixture
def folder(make_embedder, tmp_path):
    save_embedder(make_embedder(), tmp_path / "model", prompts=PROMPTS)
    return tmp_path / "model"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "pooling", [LatentAttentionConfig(num_latents=8, num_heads=2), MeanConfig(), LastTokenConfig()]
)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_reloads_to_identical_vectors(family, pooling, bidirectional, make_embedder, tmp_path):
    embedder = make_embedder(family=family, pooling=pooling, bidirectional=bidirectional, text={"add_bos": True})
    save_embedder(embedder, tmp_path / "model", prompts=PROMPTS)
    again = load_embedder(tmp_path / "model")
    assert again.config == embedder.config and not again.training
    assert np.abs(again.encode(TEXTS, prompt=PREFIX) - embedder.encode(TEXTS, prompt=PREFIX)).max() <= 1e-6
    assert np.abs(again.encode(TEXTS) - embedder.encode(TEXTS)).max() <= 1e-6
    np.testing.assert_array_equal(again.encode(TEXTS, prompt_name="query"), again.encode(TEXTS, prompt=PREFIX))


def test_what_is_in_it(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        *("config.json", "model.safetensors", "1_Pooling/model.safetensors", "tokenizer.json", "README.md"),
        *("modules.json", "config_sentence_transformers.json", "nvembed.json", "probes.json", "probes.safetensors"),
    } <= names
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pickle"))}
    assert not (folder.parent / ".tmp").exists()
    with safe_open(folder / "model.safetensors", "np") as file:
        keys = set(file.keys())
    assert "embed_tokens.weight" in keys and not any("lm_head" in key or "latent" in key for key in keys)
    assert json.loads((folder / "config.json").read_text())["is_causal"] is False
    described = describe_folder(folder)
    assert described["prompts"] == PROMPTS and described["dim"] == 64
    assert described["embedder"]["pooling"]["type"] == "latent_attention"
    assert {oct(path.stat().st_mode & 0o777) for path in folder.rglob("*") if path.is_file()} == {
        oct((folder / "README.md").stat().st_mode & 0o777)
    }


def test_recipe_card_and_prompts(make_embedder, tmp_path):
    recipe = {"name": "tiny", "prepare": {"seed": 17}}
    save_embedder(make_embedder(), tmp_path / "m", recipe=recipe, prompts=PROMPTS, card="Data: made up. Licence: none.")
    assert yaml.safe_load((tmp_path / "m" / "recipe.yaml").read_text()) == recipe
    card = (tmp_path / "m" / "README.md").read_text()
    assert "Data: made up. Licence: none." in card and "trust_remote_code=True" in card
    assert "Given a web search query" in card and "64-dimensional" in card
    stored = json.loads((tmp_path / "m" / "config_sentence_transformers.json").read_text())
    assert stored["prompts"] == {"document": "", "query": PREFIX}
    save_embedder(make_embedder(pooling=LastTokenConfig()), tmp_path / "plain")
    assert "trust_remote_code" not in (tmp_path / "plain" / "README.md").read_text()
    assert not list((tmp_path / "plain").glob("*.py")) and not (tmp_path / "plain" / "recipe.yaml").exists()


def test_ours_is_replaced_and_others_never(make_embedder, folder, tmp_path):
    save_embedder(make_embedder(seed=5, pooling=MeanConfig()), folder)
    assert describe_folder(folder)["embedder"]["pooling"]["type"] == "mean"
    assert not (folder / "1_Pooling" / "model.safetensors").exists()  # nothing of the old one is left
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a model folder of nvembed, so it is not overwritten"):
        save_embedder(make_embedder(), tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not overwritten"):
        save_embedder(make_embedder(), tmp_path / "file")


def test_a_killed_save_leaves_the_old_folder_and_does_not_block_the_next(make_embedder, folder, monkeypatch):
    from nvembed.modeling import probes

    def killed(*args):
        raise KeyboardInterrupt

    before = load_embedder(folder).encode(TEXTS)
    monkeypatch.setattr(probes, "write_probes", killed)
    with pytest.raises(KeyboardInterrupt):
        save_embedder(make_embedder(seed=9), folder)
    np.testing.assert_array_equal(load_embedder(folder).encode(TEXTS), before)
    monkeypatch.undo()
    save_embedder(make_embedder(seed=9), folder)
    assert not np.allclose(load_embedder(folder).encode(TEXTS), before)
    assert not (folder.parent / ".tmp").exists()


def test_a_library_that_ignores_the_switch_is_refused(folder, monkeypatch):
    """What an older transformers does: the key is read, kept and has no effect."""
    from transformers import masking_utils

    build = masking_utils.create_causal_mask

    def causal(config, *args, **kwargs):
        config = type(config)(**{**config.to_dict(), "is_causal": True})
        config._attn_implementation = "eager"
        return build(config, *args, **kwargs)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", causal)
    monkeypatch.setattr("nvembed.modeling.embedder.set_bidirectional", eager)
    with pytest.raises(UserError, match=r"model is bidirectional, but transformers \S+, torch \S+ runs it causal"):
        load_embedder(folder)
    load_embedder(folder, check_probes=False)


def eager(model, bidirectional):
    """The switch, with attention that takes its mask from the builder alone."""
    from nvembed.modeling.bidirectional import set_bidirectional

    set_bidirectional(model, bidirectional)
    model.set_attn_implementation("eager")


def test_a_changed_switch_in_config_json_is_refused(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"is_causal": false', '"is_causal": true'))
    with pytest.raises(UserError, match=r"config\.json says is_causal=True, nvembed\.json says bidirectional=True"):
        load_embedder(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "1_Pooling/model.safetensors"])
def test_changed_weights_are_found_by_the_probes(folder, file):
    weights = load_file(folder / file)
    name = "norm.weight" if "norm.weight" in weights else "latents"
    weights[name] = weights[name][..., ::-1].copy() * np.linspace(0.5, 2, weights[name].shape[-1], dtype=np.float32)
    save_file(weights, folder / file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="probe texts give other vectors than stored"):
        load_embedder(folder)


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "1_Pooling/model.safetensors", "nvembed.json", "probes.safetensors", "tokenizer.json"],
)
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damage_is_explained(folder, file, damage):
    path = folder / file
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=str(folder)):
        load_embedder(folder)


def test_other_formats_and_folders_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="not an nvembed model folder"):
        load_embedder(tmp_path / "nowhere")
    described = json.loads((folder / "nvembed.json").read_text())
    (folder / "nvembed.json").write_text(json.dumps({**described, "format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        load_embedder(folder)
    described["embedder"]["colour"] = "red"
    (folder / "nvembed.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="colour"):
        load_embedder(folder)


def test_overrides_for_the_untrained_variants(folder, make_embedder):
    vectors = {}
    for pooling in (MeanConfig(), LastTokenConfig()):
        for bidirectional in (True, False):
            again = load_embedder(folder, pooling=pooling, bidirectional=bidirectional)
            expected = make_embedder(pooling=pooling, bidirectional=bidirectional)
            assert again.config == expected.config
            vectors[pooling.type, bidirectional] = again.encode(TEXTS, prompt=PREFIX)
            np.testing.assert_allclose(
                vectors[pooling.type, bidirectional], expected.encode(TEXTS, prompt=PREFIX), atol=1e-6
            )
    assert len({array.tobytes() for array in vectors.values()}) == 4
    same = load_embedder(folder, pooling=load_embedder(folder).config.pooling)
    np.testing.assert_array_equal(same.encode(TEXTS), load_embedder(folder).encode(TEXTS))
    with pytest.raises(UserError, match="only mean and last_token can replace it"):
        load_embedder(folder, pooling=LatentAttentionConfig(num_latents=3))


def test_a_copied_folder_is_the_same_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    np.testing.assert_array_equal(
        load_embedder(tmp_path / "elsewhere").encode(TEXTS), load_embedder(folder).encode(TEXTS)
    )
