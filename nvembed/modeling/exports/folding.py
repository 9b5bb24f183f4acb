"""Latent attention folded for inference: everything that only the constant latents decide is computed once.

With x the normalised state, head h of the published block is

    softmax(x Wq_h^T K_h^T / sqrt(E)) V_h Wo_h^T,    K, V = norm_context(latents) Wkv^T

and the products on either side of the softmax are constants: `scores` = K_h Wq_h / sqrt(E) [R, D] and
`mix` = Wo_h V_h^T [D, R]. At NV-Embed's sizes 538,976,256 numbers become 33,554,432. Folded in float64.

Shapes: D width, R latents, H heads, E width of a head.
"""

from __future__ import annotations

import math

import torch

from nvembed.modeling.config import FoldedLatentAttentionConfig, LatentAttentionConfig
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.latent_attention import (
    CrossAttention,
    FoldedCrossAttention,
    FoldedLatentAttention,
    LatentAttention,
    PreNorm,
)
from nvembed.types import UserError


@torch.no_grad()
def fold_head(head: LatentAttention) -> FoldedLatentAttention:
    """The same function with the latents, their norm, keys and values folded away, of the same dtype and device."""
    attend, feed_forward = head.cross_attend_blocks
    assert isinstance(attend, PreNorm) and isinstance(attend.fn, CrossAttention) and attend.norm_context is not None
    latents_RD = head.latents
    num_latents, hidden = latents_RD.shape
    inner = feed_forward.fn.net[2].in_features  # type: ignore[index, union-attr]
    with torch.device(latents_RD.device):
        folded = FoldedLatentAttention(
            hidden, num_latents=num_latents, num_heads=attend.fn.num_heads, mlp_ratio=int(inner) // hidden
        ).to(latents_RD.dtype)
    outer, after = folded.cross_attend_blocks
    assert isinstance(outer, PreNorm) and isinstance(outer.fn, FoldedCrossAttention)
    after.load_state_dict(feed_forward.state_dict())
    outer.norm.load_state_dict(attend.norm.state_dict())
    mixer = outer.fn
    scores, mix = _products(attend, latents_RD)
    mixer.scores.weight.copy_(scores)
    mixer.mix.weight.copy_(mix)
    return folded.train(head.training)


def _products(attend: PreNorm, latents_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`scores` [H*R, D] and `mix` [D, H*R], float64."""
    fn, norm = attend.fn, attend.norm_context
    assert isinstance(fn, CrossAttention) and norm is not None
    context_RD = torch.nn.functional.layer_norm(
        latents_RD.double(), norm.normalized_shape, norm.weight.double(), norm.bias.double(), norm.eps
    )
    key_RI, value_RI = (context_RD @ fn.to_kv.weight.double().T).chunk(2, dim=-1)
    key_HRE, value_HRE = (part.unflatten(-1, (fn.num_heads, -1)).transpose(0, 1) for part in (key_RI, value_RI))
    query_HED = fn.to_q.weight.double().unflatten(0, (fn.num_heads, -1))
    out_HED = fn.to_out.weight.double().T.unflatten(0, (fn.num_heads, -1))
    scores_HRD = key_HRE @ query_HED / math.sqrt(key_HRE.shape[-1])
    mix_HRD = value_HRE @ out_HED
    return scores_HRD.flatten(0, 1), mix_HRD.flatten(0, 1).T


def fold_embedder(embedder: Embedder) -> Embedder:
    """An embedder with the head folded; the backbone is shared.

    Raises:
        UserError: its pooling is not (unfolded) latent attention.
    """
    pooling = embedder.config.pooling
    if not isinstance(pooling, LatentAttentionConfig):
        raise UserError(f"only latent attention can be folded; this model's pooling is {pooling.type}.")
    assert isinstance(embedder.latent_attention_model, LatentAttention)
    folded = FoldedLatentAttentionConfig(**pooling.model_dump(include={"num_latents", "num_heads", "mlp_ratio"}))
    config = embedder.config.model_copy(update={"pooling": folded})
    result = Embedder(embedder.embedding_model, embedder.tokeniser, config)
    result.latent_attention_model = fold_head(embedder.latent_attention_model)
    return result.eval()
