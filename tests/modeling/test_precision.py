"""Precision: what auto means, and that bf16 is autocast over float32 weights."""

import pytest
import torch

from nvembed.modeling.precision import autocast, resolve_precision
from nvembed.types import UserError


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_auto_asks_the_processor(avx512, amx, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_precision("auto", torch.device("cpu")) == expected
    assert resolve_precision("fp32", torch.device("cpu")) == "fp32"
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"


def test_unknown_word_is_refused():
    with pytest.raises(UserError, match="fp16"):
        resolve_precision("fp16", "cpu")
    with pytest.raises(UserError, match="auto"):
        autocast("auto", "cpu")


def test_autocast_casts_products_not_weights():
    linear = torch.nn.Linear(4, 4)
    with autocast("bf16", "cpu"):
        assert linear(torch.ones(1, 4)).dtype == torch.bfloat16
    assert linear.weight.dtype == torch.float32
    with autocast("fp32", "cpu"):
        assert linear(torch.ones(1, 4)).dtype == torch.float32
