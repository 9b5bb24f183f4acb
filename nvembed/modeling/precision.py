"""Precision of a forward: fp32, or bf16 as autocast over float32 weights, where the device has bf16 products.

Never `.to(bfloat16)` a decoder: that casts RoPE's frequencies too, and every position turns by the wrong angle.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch

from nvembed.core.arguments import check_choice, shown
from nvembed.types import UserError

Precision = Literal["fp32", "bf16"]
PRECISIONS = ("auto", "fp32", "bf16")


def resolve_precision(precision: str, device: torch.device | str = "cpu") -> Precision:
    """`auto` becomes bf16 where the processor has instructions for it (1.7x on avx512_bf16), else fp32.

    Raises:
        UserError: another value than auto, fp32, bf16.
    """
    if check_choice("precision", precision, PRECISIONS) != "auto":
        return cast(Precision, precision)
    return "bf16" if has_bf16(device) else "fp32"


def check_device(device: Any) -> str:
    """The name of a device that torch finds here: "cpu", "cuda" or "cuda:1"; a `torch.device` is one too.

    Raises:
        UserError: anything else.
    """
    name = str(device) if isinstance(device, torch.device) else device
    kind, _, number = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind == "cpu" and number in ("", "0"):
        return "cpu"
    numbered = number.isdigit() or name == "cuda"
    if kind == "cuda" and numbered and torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count():
        return name
    raise UserError(f"device {shown(device)} is not here; use cpu, or cuda where torch finds a GPU")


def has_bf16(device: torch.device | str = "cpu") -> bool:
    """Whether a device has instructions for bf16 products: a GPU as torch says, a CPU with avx512_bf16 or AMX."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type == "cpu":  # private names: torch has no public ones (2.10-2.13)
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(probe() for name in names if (probe := getattr(torch.cpu, name, None)) is not None)
    return False


def autocast(precision: str, device: torch.device | str = "cpu") -> AbstractContextManager[Any]:
    """Context in which matrix products run in `precision` ("fp32" or "bf16"); weights stay float32."""
    if precision == "fp32":
        return nullcontext()
    if precision == "bf16":
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    raise UserError(f"precision {precision!r} cannot be used here; resolve it to fp32 or bf16 first.")
