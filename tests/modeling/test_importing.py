"""NV-Embed checkpoints at small size, in the published key layout: read exactly, refused by name, trained on."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from nv_embed_kit import NV_EMBED, transcription
from safetensors.torch import save_file
from typer.testing import CliRunner

from nvembed.commands.app import app
from nvembed.modeling.assemble import continue_embedder
from nvembed.modeling.config import EmbedderConfig, InitialiseConfig, NvembedBackbone
from nvembed.modeling.exports.forms import ExportSpec, export_model
from nvembed.modeling.folder import load_embedder
from nvembed.modeling.importing import import_nv_embed
from nvembed.registry.provenance import imported, licences, trace
from nvembed.text.instructions import instruction_prefix
from nvembed.training.initialise import INITIALISE
from nvembed.types import Artifact, UserError

D, LAYERS, HEADS, KV, INTER, VOCAB = 32, 2, 4, 2, 48, 400
LATENTS, CROSS, WIDTH = 6, 2, 32
SMALL = {4096: D, 512: LATENTS, 32768: CROSS * WIDTH, 65536: 2 * CROSS * WIDTH, 16384: 4 * D}
TEXTS = ["how do I sort a list", "x", "Größe 東京", "heap overflow " * 30]

THETA = 5000.0  # no default of transformers: one that was not carried over turns every position by another angle

CONFIG = {
    "architectures": ["NVEmbedModel"],
    "model_type": "nvembed",
    "add_eos": True,
    "add_pad_token": True,
    "hidden_size": D,
    "is_mask_instruction": True,
    "mask_type": "b",
    "padding_side": "right",
    "latent_attention_config": {
        "model_type": "latent_attention",
        "num_latents_value": LATENTS,
        "num_cross_heads": CROSS,
        "hidden_dim": D,
        "latent_dim": D,
        "cross_dim_head": WIDTH,
        "output_normalize": True,
    },
    "text_config": {
        "_name_or_path": "nvidia/NV-Embed-v2",
        "architectures": ["MistralModel"],
        "model_type": "bidir_mistral",
        "vocab_size": VOCAB,
        "hidden_size": D,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": THETA,
        "sliding_window": 4,
        "torch_dtype": "float32",
    },
}


def published_shapes():
    """Name -> shape of the table of the published model, at small size."""
    # the two inputs of the GEGLU's linear share a number with the heads' at 7B, so they are told apart by name
    shapes = {
        f"latent_attention_model.{name}": [
            8 * D if size == 32768 and ".1.fn" in name else SMALL[size] for size in shape
        ]
        for name, shape in NV_EMBED.items()
    }
    shapes["embedding_model.embed_tokens.weight"] = [VOCAB, D]
    shapes["embedding_model.norm.weight"] = [D]
    keys = D // HEADS * KV
    for layer in range(LAYERS):
        for name, shape in {
            "self_attn.q_proj": [D, D],
            "self_attn.k_proj": [keys, D],
            "self_attn.v_proj": [keys, D],
            "self_attn.o_proj": [D, D],
            "mlp.gate_proj": [INTER, D],
            "mlp.up_proj": [INTER, D],
            "mlp.down_proj": [D, INTER],
            "input_layernorm": [D],
            "post_attention_layernorm": [D],
        }.items():
            shapes[f"embedding_model.layers.{layer}.{name}.weight"] = shape
    return shapes


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, shape in published_shapes().items():
        noise = torch.randn(shape, generator=generator)
        one = "norm" in name and name.endswith("weight")
        found[name] = 1 + 0.2 * noise if one else noise / math.sqrt(shape[-1])
    return found


@pytest.fixture
def checkpoint(tmp_path, tokenizer, weights):
    folder = tmp_path / "NV-Embed-small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    token = {"content": "<|endoftext|>", "lstrip": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>", "eos_token": token}))
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def plain_vector(weights, ids, pooled):
    """The whole model for one text by its formulas: Mistral's layers without a causal mask, then the head, the mean."""

    def rms(x, name):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * weights[name]

    state = weights["embedding_model.embed_tokens.weight"][ids]
    length, width = len(ids), D // HEADS
    rate = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * torch.cat([rate, rate])[None]

    def turned(x):
        half = width // 2
        return x * angle.cos() + torch.cat([-x[:, half:], x[:, :half]], dim=-1) * angle.sin()

    for layer in range(LAYERS):
        here = f"embedding_model.layers.{layer}"
        x = rms(state, f"{here}.input_layernorm.weight")
        q, k, v = (x @ weights[f"{here}.self_attn.{name}_proj.weight"].T for name in "qkv")
        heads = []
        for h in range(HEADS):
            query = turned(q[:, h * width : (h + 1) * width])
            group = slice((h // (HEADS // KV)) * width, (h // (HEADS // KV) + 1) * width)
            shares = torch.softmax(query @ turned(k[:, group]).T / math.sqrt(width), dim=-1)
            heads.append(shares @ v[:, group])
        state = state + torch.cat(heads, dim=-1) @ weights[f"{here}.self_attn.o_proj.weight"].T
        x = rms(state, f"{here}.post_attention_layernorm.weight")
        gate, up = (x @ weights[f"{here}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        state = state + (torch.nn.functional.silu(gate) * up) @ weights[f"{here}.mlp.down_proj.weight"].T
    state = rms(state, "embedding_model.norm.weight")
    head = {name.removeprefix("latent_attention_model."): weights[name] for name in weights if "latent" in name}
    mixed = transcription(head, CROSS, state[None])[0]
    vector = mixed[torch.tensor(pooled, dtype=torch.bool)].mean(dim=0)
    return vector / vector.norm()


def test_vectors_are_those_of_the_published_formulas(checkpoint, weights, tmp_path):
    record = import_nv_embed(checkpoint, tmp_path / "model", max_length=64)
    assert record["parameters"] == sum(math.prod(shape) for shape in published_shapes().values())
    embedder = load_embedder(tmp_path / "model")
    assert {name: list(tensor.shape) for name, tensor in embedder.state_dict().items()} == published_shapes()
    assert embedder.embedding_model.config.sliding_window is None and embedder.config.text.add_bos
    double = {name: tensor.double() for name, tensor in weights.items()}
    for instruction in ("", instruction_prefix("web_search")):
        found = embedder.encode(TEXTS, prompt=instruction)
        for row, tokens in zip(found, embedder.tokeniser.encode(TEXTS, [instruction] * len(TEXTS)), strict=True):
            expected = plain_vector(double, tokens.input_ids, tokens.pool_mask)
            assert np.abs(row - expected.numpy()).max() <= 1e-5


def test_one_file_is_read_too(checkpoint, weights, tmp_path):
    for path in checkpoint.glob("model*"):
        path.unlink()
    save_file({name: tensor.half() for name, tensor in weights.items()}, checkpoint / "model.safetensors")
    import_nv_embed(checkpoint, tmp_path / "model", max_length=64)
    state = load_embedder(tmp_path / "model").state_dict()
    assert all(torch.equal(state[name], tensor.half().float()) for name, tensor in weights.items())


def test_what_does_not_fit_is_listed(checkpoint, weights, tmp_path):
    def refused(match, tensors=None, **config):
        if tensors is not None:
            (checkpoint / "model.safetensors.index.json").unlink(missing_ok=True)
            for path in checkpoint.glob("model*.safetensors"):
                path.unlink()
            save_file(tensors, checkpoint / "model.safetensors")
        (checkpoint / "config.json").write_text(json.dumps({**CONFIG, **config}))
        with pytest.raises(UserError, match=match):
            import_nv_embed(checkpoint, tmp_path / "model")
        assert not (tmp_path / "model").exists()

    head = CONFIG["latent_attention_config"]
    refused("hidden_dim 4096, latent_dim 32, but the decoder's hidden_size is 32",
            latent_attention_config={key: value for key, value in head.items() if key != "hidden_dim"})  # fmt: skip
    refused("is not known", text_config={**CONFIG["text_config"], "model_type": "bert"})
    refused(r"latents has shape \[6, 32\], the config says \[7, 32\]",
            latent_attention_config={**head, "num_latents_value": 7})  # fmt: skip
    less = {name: tensor for name, tensor in weights.items() if not name.endswith("norm_context.bias")}
    refused(
        r"2 do not fit:\n  missing: latent_attention_model.cross_attend_blocks.0.norm_context.bias\n  unknown: lm_head",
        {**less, "lm_head.weight": torch.zeros(2)},
    )
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickled")
    refused("pickled weights are not read")
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    with pytest.raises(UserError, match=r"initialise\.backbone"):
        import_nv_embed(checkpoint, tmp_path / "model")


def test_the_command(checkpoint, tmp_path):
    done = CliRunner().invoke(app, ["import", str(checkpoint), str(tmp_path / "model"), "--max-length", "64"])
    assert done.exit_code == 0, done.output
    written = done.stdout.partition("write in a recipe:\n")[2]
    assert yaml.safe_load(written)["initialise"]["backbone"] == {"type": "nvembed", "name": str(tmp_path / "model")}
    again = CliRunner().invoke(app, ["import", str(checkpoint), str(tmp_path / "b"), "--max-length", "64", "--json"])
    assert json.loads(again.stdout)["dim"] == D


def test_an_index_cannot_point_outside(checkpoint, tmp_path):
    index = {"weight_map": {"latents": "../elsewhere.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside the folder"):
        import_nv_embed(checkpoint, tmp_path / "model")


def test_going_on_from_it_keeps_the_head(checkpoint, tmp_path):
    record = import_nv_embed(checkpoint, tmp_path / "model", max_length=64)
    start = NvembedBackbone(name=str(tmp_path / "model"))
    original = load_embedder(tmp_path / "model")
    config = EmbedderConfig.model_validate(record["embedder"])
    assert np.array_equal(continue_embedder(start, config).encode(TEXTS), original.encode(TEXTS))
    shorter = config.model_copy(update={"text": config.text.model_copy(update={"max_length": 16})})
    found = continue_embedder(start, shorter)
    assert found.config == shorter and np.abs(found.encode(TEXTS[:2]) - original.encode(TEXTS[:2])).max() <= 1e-6
    with pytest.raises(UserError, match=r"pooling\.num_latents: 6 -> 7"):
        pooling = config.pooling.model_copy(update={"num_latents": 7})
        continue_embedder(start, config.model_copy(update={"pooling": pooling}))
    with pytest.raises(UserError, match="must be a folder"):
        continue_embedder(NvembedBackbone(name="models:/x@champion"), config)


def test_one_optimiser_step_from_an_imported_model(checkpoint, tmp_path):
    """As a recipe does it: `initialise` with the imported folder, then the training loop on what that publishes."""
    from training_kit import train_job

    (checkpoint / "README.md").write_text("---\nlicense: cc-by-nc-4.0\nbase_model: x/y\n---\n# a model\n")
    record = import_nv_embed(checkpoint, tmp_path / "model", max_length=64)
    section = yaml.safe_load(record["recipe"])["initialise"]
    datasets = {"cwe": {"instruction": "Instruct: Find\nQuery: ", "task": "retrieval"}}
    manifest = {"metrics": {"datasets": datasets}, "config": {"sources": [{"name": "cwe"}]}, "content_hash": "p"}
    prepare = Artifact(str(tmp_path / "prepare"), manifest)
    start = INITIALISE.run(InitialiseConfig(**section), {"prepare": prepare}, str(tmp_path / "initialise"))
    card = start.manifest["metrics"]["started_from"]["card"]
    assert card["license"] == "cc-by-nc-4.0" and card["base_model"] == ["x/y"]
    found = trace(start, start)
    assert licences(found) == [{"kind": "backbone", "name": "x/y", "licence": "cc-by-nc-4.0"}]
    assert imported(found) == [str(tmp_path / "model")]
    begun = load_embedder(start.path("model"))
    assert np.array_equal(begun.encode(TEXTS), load_embedder(tmp_path / "model").encode(TEXTS))

    config = {
        "adapter": {"type": "lora", "r": 2, "alpha": 4, "dropout": 0.0},
        "engine": {"type": "torch"},
        "precision": "fp32",
        "optimiser": {"learning_rate": 1e-2},
    }
    assert train_job(config, start.path("model"), tmp_path / "train", steps=1) == 0
    trained = load_embedder(tmp_path / "train" / "model")
    moved = np.abs(trained.encode(TEXTS) - begun.encode(TEXTS)).max()
    assert 1e-6 < moved < 0.5 and trained.config == begun.config
    # what LoRA learned is kept beside what it was merged into, and stands on the model of `initialise`
    again = export_model(
        ExportSpec(tmp_path / "train" / "model", tmp_path / "a", "adapter", (), Path(start.path("model")))
    )
    assert again["base"]["name"] == "initialise/model" and again["parity"]["probes"]["max_difference"] <= 1e-5
