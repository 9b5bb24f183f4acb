"""From token states to one vector per text; always in float32.

torch only: this file is copied into model folders (see `export.py`).
Shapes: N texts, L tokens, D width.
"""

from __future__ import annotations

import torch


def mean_pool(states_NLD: torch.Tensor, pool_mask_NL: torch.Tensor) -> torch.Tensor:
    """[N, D] float32: mean of the states whose mask is 1 (each text has at least one)."""
    weights_NL1 = pool_mask_NL.unsqueeze(-1).float()
    return (states_NLD.float() * weights_NL1).sum(dim=1) / weights_NL1.sum(dim=1)


def last_token_pool(states_NLD: torch.Tensor, attention_mask_NL: torch.Tensor) -> torch.Tensor:
    """[N, D] float32: state of each text's last real token; padding is on the right."""
    last_N = attention_mask_NL.long().sum(dim=1) - 1
    return states_NLD[torch.arange(states_NLD.shape[0], device=states_NLD.device), last_N].float()


def normalise(vectors_ND: torch.Tensor) -> torch.Tensor:
    """Rows of length 1, float32."""
    return torch.nn.functional.normalize(vectors_ND.float(), dim=-1)
