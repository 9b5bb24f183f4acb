"""The planned memory of a worker against real workers: real loop, real engine, random decoders of several sizes.

What is compared is growth: the resident size of a worker at its peak, over its size before the model was loaded (after
a first tiny training, so that libraries are read in).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from memory_kit import Case, measure

from nvembed.modeling.config import LatentAttentionConfig, MeanConfig
from nvembed.modeling.shapes import Shape
from nvembed.plan.memory import Memory, stage_memory
from nvembed.plan.sizes import Model, StageSizes
from nvembed.training.config import TrainConfig

LORA = {"type": "lora", "r": 16, "alpha": 32, "dropout": 0.1}
FULL = {"type": "full"}
MIB = 2**20


def train(zero: int, adapter: dict[str, Any] = FULL, precision: str = "fp32", **more: Any) -> dict[str, Any]:
    engine = {"type": "deepspeed", "zero_stage": zero}
    return {"adapter": adapter, "engine": engine, "precision": precision, "num_workers": 2, **more}


CASES = {
    "stage 0": Case(train(0)),
    "stage 1": Case(train(1)),
    "stage 1, bf16, wider": Case(
        train(1, precision="bf16"), hidden=768, intermediate=2048, heads=12, kv_heads=4, layers=4, batch=8, length=100
    ),
    "stage 2": Case(train(2)),
    "stage 2, bf16, large vocabulary, latents": Case(
        train(2, precision="bf16"), hidden=576, heads=9, kv_heads=3, vocab=49152, latents=64, batch=32, length=40
    ),
    "stage 2, chunks": Case(train(2, token_budget=640)),
    "stage 2, LoRA": Case(train(2, LORA)),
    "stage 2, LoRA, bf16": Case(train(2, LORA, "bf16")),
    "stage 3": Case(train(3)),
    "stage 3, LoRA": Case(train(3, LORA)),
    "plain torch": Case({**train(2), "engine": {"type": "torch"}}),
}


def planned(case: Case) -> Memory:
    config = TrainConfig.model_validate(case.train)
    shape = Shape(
        case.layers, case.layers, case.hidden, case.intermediate, case.heads, case.kv_heads, case.hidden // case.heads,
        case.vocab,
    )  # fmt: skip
    pooling = LatentAttentionConfig(num_latents=case.latents) if case.latents else MeanConfig()
    sizes = StageSizes("stage", config, case.steps, case.batch, case.group, case.length, Model(shape, pooling))
    return stage_memory(sizes, precision=config.precision)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_the_planned_growth_of_a_worker_is_within_15_percent(name: str, tmp_path: Path) -> None:
    ranks = measure(CASES[name], tmp_path / "ranks", timeout=800)
    measured = max(rank["peak"] - rank["before"] for rank in ranks)
    ours = planned(CASES[name]).growth / MIB
    print(f"{name}: planned {ours:.0f} MiB, measured {measured:.0f} MiB, ratio {ours / measured:.2f}")
    assert measured > 100, "there is something to measure"
    assert ours == pytest.approx(measured, rel=0.15)
