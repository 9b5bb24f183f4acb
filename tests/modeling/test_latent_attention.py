"""Latent attention: names, shapes and counts of NV-Embed's, and its forward against a plain transcription."""

import math

import pytest
import torch
from nv_embed_kit import NV_EMBED, transcription

from nvembed.modeling.config import EmbedderConfig, LatentAttentionConfig
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.latent_attention import LatentAttention
from nvembed.text.config import TextConfig
from nvembed.text.tokenise import Tokeniser
from nvembed.types import UserError


def test_nv_embeds_keys_shapes_and_size_at_7b(tokenizer):
    from transformers import MistralConfig, MistralModel

    mistral = MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        sliding_window=4096,
    )
    text = TextConfig(add_bos=True)
    config = EmbedderConfig(pooling=LatentAttentionConfig(num_latents=512, num_heads=8, head_dim=4096), text=text)
    with torch.device("meta"):
        embedder = Embedder(MistralModel(mistral), Tokeniser(tokenizer, text), config)
    state = {name: list(tensor.shape) for name, tensor in embedder.state_dict().items()}
    head = {name: shape for name, shape in state.items() if not name.startswith("embedding_model.")}
    assert head == {f"latent_attention_model.{name}": shape for name, shape in NV_EMBED.items()}
    decoder = {name.removeprefix("embedding_model.") for name in state if name.startswith("embedding_model.")}
    assert {"embed_tokens.weight", "norm.weight", "layers.31.self_attn.q_proj.weight"} <= decoder
    assert len(decoder) == 2 + 32 * 9 and not any("lm_head" in name for name in decoder)
    assert sum(math.prod(shape) for shape in state.values()) == 7_851_016_192
    assert sum(math.prod(shape) for shape in head.values()) == 740_356_096
    assert {name for name, _ in embedder.head_parameters()} == set(head)


@pytest.mark.parametrize(("heads", "head_dim", "ratio"), [(4, None, 4), (2, 24, 4), (3, 24, 2)])
def test_forward_equals_the_transcription(heads, head_dim, ratio):
    torch.manual_seed(0)
    head = LatentAttention(24, num_latents=7, num_heads=heads, head_dim=head_dim, mlp_ratio=ratio).double()
    for parameter in head.parameters():  # biases and norms away from 0 and 1, so that each of them counts
        parameter.data += 0.3 * torch.randn_like(parameter)
    states = torch.randn(3, 5, 24, dtype=torch.float64)
    with torch.no_grad():
        found = head(states)
        expected = transcription(head.state_dict(), heads, states)
    assert (found - expected).abs().max() < 1e-10


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    head = LatentAttention(16, num_latents=4, num_heads=4)
    head(torch.randn(2, 3, 16)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in head.parameters())


def test_sizes_are_configurable_and_bad_ones_are_refused(make_embedder):
    pooling = LatentAttentionConfig(num_latents=5, num_heads=2, head_dim=10, mlp_ratio=3)
    head = make_embedder(pooling=pooling).latent_attention_model
    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    assert shapes["latents"] == (5, 64)
    assert shapes["cross_attend_blocks.0.fn.to_kv.weight"] == (40, 64)
    assert shapes["cross_attend_blocks.1.fn.net.0.weight"] == (384, 64)
    with pytest.raises(UserError, match="hidden size 64 is not divisible by num_heads 7"):
        make_embedder(pooling=LatentAttentionConfig(num_heads=7))


def test_latents_are_standard_normal_and_seeded(make_embedder):
    pooling = LatentAttentionConfig(num_latents=256, num_heads=4)
    a, b, c = (make_embedder(pooling=pooling, seed=seed).latent_attention_model.latents for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert abs(a.std().item() - 1) < 0.02 and abs(a.mean().item()) < 0.02
