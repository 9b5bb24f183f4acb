"""Writes `tests/assets/golden_losses.json`: losses of tiny runs, compared by `test_golden.py` within 1e-5.

    python tests/training/golden.py

Run it only when a change of the numbers is meant, and say why in the commit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from training_kit import run_steps

from nvembed.training.config import TrainConfig

ASSET = Path(__file__).parents[1] / "assets" / "golden_losses.json"
STEPS = 20

COMMON: dict[str, Any] = {
    "optimiser": {"learning_rate": 1e-3, "weight_decay": 0.03, "eps": 1e-5},
    "engine": {"type": "torch"},
    "precision": "fp32",
    "token_budget": 150,
}
RUNS: dict[str, dict[str, Any]] = {
    "contrastive_in_batch": {"objective": {"type": "contrastive", "temperature": 0.05, "matryoshka_dims": [16]}},
    "contrastive_hard_only": {"objective": {"type": "contrastive", "in_batch": False, "temperature": 0.05}},
    "gecko_query_negatives": {
        "objective": {"type": "contrastive", "query_negatives": True, "learned_temperature": True}
    },
    "lora": {"adapter": {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0}},
    "distill": {"objective": {"type": "distill", "matryoshka_dims": [16], "similarity_weight": 0.5}},
}


def measure(name: str) -> list[float]:
    """Loss of each of the `STEPS` optimiser steps of a run."""
    torch.set_num_threads(1)
    losses: list[float] = run_steps(TrainConfig.model_validate(COMMON | RUNS[name]), steps=STEPS)[0]["losses"]
    return losses


if __name__ == "__main__":
    golden = {"command": "python tests/training/golden.py", "losses": {name: measure(name) for name in RUNS}}
    ASSET.parent.mkdir(exist_ok=True)
    ASSET.write_text(json.dumps(golden, indent=2) + "\n")
