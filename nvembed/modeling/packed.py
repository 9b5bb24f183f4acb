"""Packed attention: the texts of a chunk follow one another in one row, without padding.

A function registered with transformers' attention interface attends within each text; everything else of a model works
token by token, so no model code is needed. `FAMILIES` says for which architectures that is true; others keep padded
batches. Texts lie sorted by length, so equal lengths are neighbours: a run of them is an ordinary batch for SDPA. On a
GPU in half precision torch's variable-length kernel takes the whole row at once. Pooling sees padded states again.

Shapes: T tokens of a row, N texts of a run, L tokens of each, H heads, E width of a head, D width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

IMPLEMENTATION = "nvembed_packed"

# Packed architectures (`config.model_type`) and the position of a text's first token. Each is tested equal to its
# padded batches. What is not named falls back to windows of similar length, for example: mpnet and t5 (a bias between
# all pairs of positions of the row), deberta (relative positions), modernbert and gemma3 (local layers that see less
# than a whole text), encoders whose code is not in transformers.
FAMILIES: dict[str, Literal["zero", "after_padding"]] = {
    "bert": "zero",  # MiniLM, e5, bge, gte (v1) are of this family
    "camembert": "after_padding",
    "distilbert": "zero",
    "electra": "zero",
    "llama": "zero",
    "mistral": "zero",
    "qwen2": "zero",
    "qwen3": "zero",
    "roberta": "after_padding",
    "xlm-roberta": "after_padding",  # multilingual e5, bge-m3
}


@dataclass(frozen=True)
class Layout:
    """Where the texts of a packed row lie.

    Attributes:
        runs: (first token, N, L) of each run of equally long texts, in order.
    """

    runs: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Layout:
        """The layout of texts of these lengths, in this order."""
        runs: list[tuple[int, int, int]] = []
        start = 0
        for length in lengths:
            if runs and runs[-1][2] == length:
                first, count, _ = runs[-1]
                runs[-1] = (first, count + 1, length)
            else:
                runs.append((start, 1, length))
            start += length
        return cls(tuple(runs))

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(length for _, _, length in self.runs)

    def batches(self, row_T: torch.Tensor) -> Iterator[torch.Tensor]:
        """[N, L, ...] of each run, a view of `row_T` [T, ...]."""
        for start, count, length in self.runs:
            yield row_T[start : start + count * length].unflatten(0, (count, length))

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each text, in order."""
        return tuple(length for _, count, length in self.runs for _ in range(count))

    def offsets(self, device: torch.device) -> torch.Tensor:
        """int32 [texts + 1]: where each text starts, and the end; moved to a device once."""
        if device not in self._offsets:
            ends = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32)
            self._offsets[device] = ends.to(device, non_blocking=True)
        return self._offsets[device]

    @functools.cached_property
    def _offsets(self) -> dict[torch.device, torch.Tensor]:
        return {}

    def padded(self, row_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[texts, longest, ...] and the bool mask [texts, longest] of what is real, from `row_T` [T, ...].

        A text is padded with its own last token: a NaN stays where it came from.
        """
        offsets = self.offsets(row_T.device).long()
        places = offsets[:-1, None] + torch.arange(self.longest, device=row_T.device)
        last = offsets[1:, None] - 1
        return row_T[torch.minimum(places, last)], places <= last


def packs(model: Any, longest: int) -> bool:
    """Whether a transformers model can run packed on texts of at most `longest` tokens.

    It can if its family is in `FAMILIES`, it runs SDPA in evaluation mode, and no text is longer than a sliding window.
    """
    config = model.config
    if getattr(config, "model_type", None) not in FAMILIES or getattr(config, "is_decoder", False):
        return False
    if config._attn_implementation != "sdpa" or model.training:
        return False
    window = getattr(config, "sliding_window", None)
    return window is None or longest <= window


@contextmanager
def packing(model: Any) -> Iterator[None]:
    """Inside, the model attends within the texts of a packed row; every call must come through `packed_states`."""
    _register()
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def packed_states(model: Any, texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Layout]:
    """Last hidden states [T, D] of token ids, and where each text lies; inside `packing(model)` only.

    Args:
        texts: token ids of each text, none empty; equal lengths next to one another make it fast.
    """
    device = next(model.parameters()).device
    layout = Layout.of([len(ids) for ids in texts])
    row = torch.tensor([number for ids in texts for number in ids], dtype=torch.long)
    first = 0 if FAMILIES[model.config.model_type] == "zero" else int(model.config.pad_token_id) + 1
    ramp = torch.arange(first, first + layout.longest)
    positions = torch.cat([ramp[:length].repeat(count) for _, count, length in layout.runs])
    options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    output = model(
        input_ids=row.unsqueeze(0).to(device),
        position_ids=positions.unsqueeze(0).to(device),
        packed_layout=layout,
        **options,
    )
    return output.last_hidden_state[0], layout


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    packed_layout: Layout | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed texts: [1, H, T, E] (keys and values may have fewer heads) -> [1, T, H, E]."""
    assert packed_layout is not None and attention_mask is None and len(query) == 1, "call it through packed_states"
    causal = bool(module.is_causal if is_causal is None else is_causal)
    query_THE, key_THE, value_THE = (part[0].transpose(0, 1) for part in (query, key, value))
    half = _varlen_type(query_THE)
    if half is not None:
        parts = (query_THE.to(half), key_THE.to(half), value_THE.to(half))
        return _varlen(parts, packed_layout, scaling, causal).unsqueeze(0), None
    mixed_THE = None
    for (start, count, length), query_NLHE, key_NLHE, value_NLHE in zip(
        packed_layout.runs, *(packed_layout.batches(part) for part in (query_THE, key_THE, value_THE)), strict=True
    ):
        mixed_NHLE = functional.scaled_dot_product_attention(
            query_NLHE.transpose(1, 2),
            key_NLHE.transpose(1, 2),
            value_NLHE.transpose(1, 2),
            scale=scaling,
            is_causal=causal,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        if mixed_THE is None:  # under autocast its type is known only now
            mixed_THE = torch.empty(query_THE.shape, dtype=mixed_NHLE.dtype, device=query.device)
        mixed_THE[start : start + count * length].view(count, length, *query_THE.shape[1:]).copy_(
            mixed_NHLE.transpose(1, 2)
        )
    assert mixed_THE is not None
    return mixed_THE.unsqueeze(0), None


def _varlen_type(query_THE: torch.Tensor) -> torch.dtype | None:
    """The type in which torch's variable-length kernel takes these heads; None where it does not."""
    if not query_THE.is_cuda or torch.cuda.get_device_capability(query_THE.device) < (8, 0):
        return None
    if query_THE.shape[-1] % 8 or query_THE.shape[-1] > 256 or not _has_varlen():
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query_THE.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


@functools.cache
def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size"} <= set(inspect.signature(varlen_attn).parameters)


def _varlen(
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor], layout: Layout, scaling: float | None, causal: bool
) -> torch.Tensor:
    """torch's variable-length kernel, [T, H, E]; fewer key heads are repeated, as SDPA would."""
    from torch.nn.attention.varlen import varlen_attn

    query_THE, key_THE, value_THE = parts
    repeats = query_THE.shape[1] // key_THE.shape[1]
    if repeats > 1:
        key_THE, value_THE = (part.repeat_interleave(repeats, dim=1) for part in (key_THE, value_THE))
    offsets = layout.offsets(query_THE.device)
    mixed = varlen_attn(
        query_THE,
        key_THE,
        value_THE,
        offsets,
        offsets,
        layout.longest,
        layout.longest,
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
    )
    assert isinstance(mixed, torch.Tensor), "no auxiliary outputs are requested"
    return mixed


@functools.cache
def _register() -> None:
    """Make the function known; when first used, as transformers takes seconds to import."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attend)
