"""NV-Embed's latent attention (arXiv 2405.17428 3.1): token states query trained latents, then a GEGLU MLP.

Module structure and parameter names are those of the published model, so that state dicts carry over:
`latents`, `cross_attend_blocks.0.fn.{to_q,to_kv,to_out}.weight`, `cross_attend_blocks.0.{norm,norm_context}.*`,
`cross_attend_blocks.1.norm.*`, `cross_attend_blocks.1.fn.net.{0,2}.*`.

`FoldedLatentAttention` is the same function for inference: the latents are constant, so what only they decide is
computed once (`exports/folding.py`).

torch only: this file is copied into model folders (see `export.py`).
Shapes: N texts, L tokens, D width, R latents, H heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


class CrossAttention(nn.Module):
    """Attention of token states over latents; no mask (every latent is real), no biases.

    The score scale is 1 / sqrt(E), as in the published code, which leaves it to scaled_dot_product_attention.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        inner = num_heads * head_dim
        self.to_q = nn.Linear(hidden_size, inner, bias=False)
        self.to_kv = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, states_NLD: torch.Tensor, context_RD: torch.Tensor) -> torch.Tensor:
        """[N, L, D] from token states [N, L, D] and latents [R, D].

        Keys and values do not depend on the texts: they are computed once, not once per text.
        """
        query_NHLE = self._heads(self.to_q(states_NLD))
        key_1HRE, value_1HRE = (self._heads(part) for part in self.to_kv(context_RD).unsqueeze(0).chunk(2, dim=-1))
        texts = len(states_NLD)
        mixed_NHLE = functional.scaled_dot_product_attention(
            query_NHLE, key_1HRE.expand(texts, -1, -1, -1), value_1HRE.expand(texts, -1, -1, -1)
        )
        mixed: torch.Tensor = self.to_out(mixed_NHLE.transpose(1, 2).flatten(2))
        return mixed

    def _heads(self, wide: torch.Tensor) -> torch.Tensor:
        return wide.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """x * gelu(gate), exact gelu; halves the width."""

    def forward(self, wide: torch.Tensor) -> torch.Tensor:
        """[..., 2M] -> [..., M]."""
        value, gate = wide.chunk(2, dim=-1)
        return value * functional.gelu(gate)


class FeedForward(nn.Module):
    """Linear to twice `mlp_ratio` widths, GEGLU, linear back."""

    def __init__(self, hidden_size: int, mlp_ratio: int) -> None:
        super().__init__()
        inner = hidden_size * mlp_ratio
        self.net = nn.Sequential(nn.Linear(hidden_size, 2 * inner), GEGLU(), nn.Linear(inner, hidden_size))

    def forward(self, states_NLD: torch.Tensor) -> torch.Tensor:
        """[N, L, D] -> [N, L, D]."""
        mixed: torch.Tensor = self.net(states_NLD)
        return mixed


class PreNorm(nn.Module):
    """LayerNorm before `fn`, and another one over its context where it has one."""

    def __init__(self, hidden_size: int, fn: nn.Module, *, context: bool) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(hidden_size)
        self.norm_context = nn.LayerNorm(hidden_size) if context else None

    def forward(self, states_NLD: torch.Tensor, context_RD: torch.Tensor | None = None) -> torch.Tensor:
        """[N, L, D] -> [N, L, D]."""
        call: Callable[..., torch.Tensor] = self.fn
        if self.norm_context is None:
            return call(self.norm(states_NLD))
        return call(self.norm(states_NLD), self.norm_context(context_RD))


class LatentAttention(nn.Module):
    """States in, states out (length and width kept); both blocks are residual and no norm follows the last.

    Args:
        hidden_size: D of the backbone.
        num_latents: R, 512 in NV-Embed.
        num_heads: H, 8 in NV-Embed.
        head_dim: E; None for D / H. NV-Embed uses the whole D (4,096) in every head.
        mlp_ratio: 4 in NV-Embed.

    Raises:
        ValueError: D is not divisible by H and `head_dim` is None.
    """

    def __init__(
        self, hidden_size: int, *, num_latents: int, num_heads: int, head_dim: int | None = None, mlp_ratio: int = 4
    ) -> None:
        super().__init__()
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"latent attention: hidden size {hidden_size} is not divisible by num_heads {num_heads}; choose "
                "another num_heads or state head_dim."
            )
        width = head_dim or hidden_size // num_heads
        self.cross_attend_blocks = nn.ModuleList(
            [
                PreNorm(hidden_size, CrossAttention(hidden_size, num_heads, width), context=True),
                PreNorm(hidden_size, FeedForward(hidden_size, mlp_ratio), context=False),
            ]
        )
        # Standard normal as published. Their size does not matter at first, norm_context takes it out; it sets how
        # fast they turn: with entries near 1, Adam at 1e-3 needs hundreds of steps to turn a latent around.
        self.latents = nn.Parameter(torch.randn(num_latents, hidden_size))

    def forward(self, states_NLD: torch.Tensor) -> torch.Tensor:
        """[N, L, D] -> [N, L, D]."""
        attend, feed_forward = self.cross_attend_blocks
        states_NLD = attend(states_NLD, self.latents) + states_NLD
        mixed_NLD: torch.Tensor = feed_forward(states_NLD) + states_NLD
        return mixed_NLD


class FoldedCrossAttention(nn.Module):
    """`CrossAttention` over constant latents as two linear maps around a softmax per head.

    With keys K_h and values V_h of the latents, head h is softmax(x Wq_h K_h^T / sqrt(E)) V_h Wo_h: the products left
    and right of the softmax are `scores` [H*R, D] and `mix` [D, H*R].
    """

    def __init__(self, hidden_size: int, num_latents: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scores = nn.Linear(hidden_size, num_heads * num_latents, bias=False)
        self.mix = nn.Linear(num_heads * num_latents, hidden_size, bias=False)

    def forward(self, states_NLD: torch.Tensor) -> torch.Tensor:
        """[N, L, D] -> [N, L, D]."""
        shares_NLHR = self.scores(states_NLD).unflatten(-1, (self.num_heads, -1)).softmax(dim=-1)
        mixed: torch.Tensor = self.mix(shares_NLHR.flatten(-2))
        return mixed


class FoldedLatentAttention(nn.Module):
    """`LatentAttention` for inference, equal to it but for rounding.

    Smaller when `num_latents` is less than about twice the width of a head: NV-Embed's attention goes from 539 M
    numbers to 33.6 M (512 latents, heads of 4,096).

    Args:
        hidden_size: D of the backbone.
        num_latents: R.
        num_heads: H.
        mlp_ratio: of the MLP, which stays as it is.
    """

    def __init__(self, hidden_size: int, *, num_latents: int, num_heads: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.cross_attend_blocks = nn.ModuleList(
            [
                PreNorm(hidden_size, FoldedCrossAttention(hidden_size, num_latents, num_heads), context=False),
                PreNorm(hidden_size, FeedForward(hidden_size, mlp_ratio), context=False),
            ]
        )

    def forward(self, states_NLD: torch.Tensor) -> torch.Tensor:
        """[N, L, D] -> [N, L, D]."""
        attend, feed_forward = self.cross_attend_blocks
        states_NLD = attend(states_NLD) + states_NLD
        mixed_NLD: torch.Tensor = feed_forward(states_NLD) + states_NLD
        return mixed_NLD
