"""Latent attention folded for inference: the same function, and the published sizes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.modeling.adapters import apply_adapter
from nvembed.modeling.config import FullConfig, LatentAttentionConfig, MeanConfig
from nvembed.modeling.exports.folding import fold_embedder, fold_head
from nvembed.modeling.folder import load_embedder, save_embedder
from nvembed.modeling.latent_attention import FoldedLatentAttention, LatentAttention
from nvembed.text.instructions import instruction_prefix
from nvembed.types import UserError

TEXTS = ["how do I sort a list", "?", "Größe 東京 🙂", "heap overflow " * 30]


def stirred(head):
    for parameter in head.parameters():  # biases and norms away from 0 and 1, so that each of them counts
        parameter.data += 0.3 * torch.randn_like(parameter)
    return head


@settings(deadline=None, max_examples=25)
@given(
    heads=st.integers(1, 4),
    width=st.integers(1, 9),
    latents=st.integers(1, 9),
    ratio=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_the_algebra_is_exact(heads, width, latents, ratio, seed):
    torch.manual_seed(seed)
    head = LatentAttention(12, num_latents=latents, num_heads=heads, head_dim=width, mlp_ratio=ratio).double()
    states = torch.randn(2, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        assert (fold_head(stirred(head))(states) - head(states)).abs().max() < 1e-11


def test_vectors_stay_within_1e_5_in_float32(make_embedder, tmp_path):
    pooling = LatentAttentionConfig(num_latents=16, num_heads=4, head_dim=64)
    embedder = make_embedder(pooling=pooling)
    with torch.no_grad():
        stirred(embedder.latent_attention_model)
    folded = fold_embedder(embedder)
    save_embedder(folded, tmp_path / "folded")
    again = load_embedder(tmp_path / "folded")
    for instruction in ("", instruction_prefix("web_search")):
        expected = embedder.encode(TEXTS, prompt=instruction)
        assert np.abs(folded.encode(TEXTS, prompt=instruction) - expected).max() <= 1e-5
        assert np.abs(again.encode(TEXTS, prompt=instruction) - expected).max() <= 1e-5
    # the fold is of the latents that were there: with others the vectors differ
    with torch.no_grad():
        embedder.latent_attention_model.latents.add_(torch.randn_like(embedder.latent_attention_model.latents))
    assert np.abs(folded.encode(TEXTS) - embedder.encode(TEXTS)).max() > 1e-4


def test_sizes_at_7b():
    with torch.device("meta"):
        head = LatentAttention(4096, num_latents=512, num_heads=8, head_dim=4096)
        folded = FoldedLatentAttention(4096, num_latents=512, num_heads=8)

    def count(module, *, without=()):
        state = {name: tensor.shape for name, tensor in module.state_dict().items()}
        return sum(math.prod(shape) for name, shape in state.items() if not name.startswith(without or ("-",)))

    feed_forward = ("cross_attend_blocks.1", "cross_attend_blocks.0.norm.")
    assert count(head) == 740_356_096 and count(head, without=feed_forward) == 538_976_256
    assert count(folded) == 234_934_272 and count(folded, without=feed_forward) == 33_554_432
    shapes = {name: list(tensor.shape) for name, tensor in folded.state_dict().items()}
    assert shapes["cross_attend_blocks.0.fn.scores.weight"] == [4096, 4096] == [8 * 512, 4096]
    assert shapes["cross_attend_blocks.0.fn.mix.weight"] == [4096, 4096]


def test_what_cannot_be_folded_or_trained_is_refused(make_embedder):
    with pytest.raises(UserError, match="only latent attention can be folded"):
        fold_embedder(make_embedder(pooling=MeanConfig()))
    folded = fold_embedder(make_embedder())
    with pytest.raises(UserError, match="only latent attention can be folded"):
        fold_embedder(folded)
    with pytest.raises(UserError, match="folded for inference"):
        apply_adapter(folded, FullConfig())
    with pytest.raises(UserError, match="nvembed export"):
        make_embedder(pooling=folded.config.pooling)
