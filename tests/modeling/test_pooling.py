"""Pooling: which states count, and float32 whatever comes in."""

import torch

from nvembed.modeling.pooling import last_token_pool, mean_pool, normalise

STATES = torch.arange(24, dtype=torch.float32).reshape(2, 4, 3)


def test_mean_over_the_pooling_mask():
    found = mean_pool(STATES, torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]]))
    assert torch.equal(found, torch.stack([STATES[0, 1:3].mean(0), STATES[1, 0]]))


def test_last_real_token():
    found = last_token_pool(STATES, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
    assert torch.equal(found, torch.stack([STATES[0, 1], STATES[1, 3]]))


def test_sums_are_float32():
    states = torch.full((1, 1000, 2), 1.01, dtype=torch.bfloat16)  # a bf16 sum stops growing at 256
    found = mean_pool(states, torch.ones(1, 1000, dtype=torch.long))
    assert found.dtype == torch.float32
    assert (found - states[0, 0].float()).abs().max() < 1e-4
    assert normalise(states[:, 0]).dtype == torch.float32
    assert torch.allclose(normalise(states[:, 0]).norm(dim=1), torch.ones(1), atol=1e-6)
