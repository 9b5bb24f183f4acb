"""`nvembed plan` of the 7B recipe on 8 x H100: every number it prints, against arithmetic by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nvembed.commands.app import app

RECIPE = Path(__file__).resolve().parents[2] / "pipelines/recipes/nv_embed_v1_7b.yaml"
GIB = 2**30

# Mistral-7B: 32 layers, 4,096 wide, 8 of 32 heads for keys and values, 14,336 inside; 32,000 words.
MAPS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
HEAD = 2 * 4096 * 32768 + 3 * 4 * 4096**2  # NV-Embed's 8 heads of 4,096; a gated MLP of factor 4
LORA = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
TRAINED = 782_299_136
TOKENS = 20_000 * 128 * 9 * 256  # steps x examples x (query, positive, 7 negatives) x half of 512


@pytest.fixture(scope="module")
def text() -> str:
    return CliRunner().invoke(app, ["plan", str(RECIPE), "--hardware", "h100x8"]).stdout


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(
        CliRunner().invoke(app, ["plan", str(RECIPE), "--hardware", "h100x8", "--json"]).stdout
    )
    return plan


def test_parameters_and_work(plan: dict[str, Any]) -> None:
    stage = plan["stages"]["stage_1"]
    assert stage["parameters"] == 7_851_016_192, "as published"
    assert LORA == 41_943_040 and stage["trained"] == TRAINED
    assert TRAINED == LORA + 740_356_096, "the adapter, and the whole head"
    assert stage["steps"] == 20_000 and stage["texts_per_step"] == 1152 and stage["tokens"] == TOKENS
    assert stage["tokens_most"] == 2 * TOKENS
    # A forward: two operations a weight; attention over 256 tokens; the head's latents. Then: cached forward, forward,
    # recomputation, gradient of the states, and that of the trained tenth of the weights.
    forward = 2 * MAPS + 4 * 32 * 256 * 4096 + 2 * HEAD + 4 * 512 * 32768
    dense = stage["parameters"] - 32000 * 4096
    assert stage["flops"] == pytest.approx(TOKENS * forward * (4 + TRAINED / dense), rel=0.01)
    assert 3.6e20 < stage["flops"] < 3.7e20


def test_memory_of_a_rank_by_part(plan: dict[str, Any], text: str) -> None:
    memory = plan["stages"]["stage_1"]["memory_bytes_per_rank"]
    whole = 7_851_016_192 + LORA
    assert memory["optimiser"] == pytest.approx(12 * TRAINED / 8), "masters and two moments of an eighth"
    assert memory["gradients"] == pytest.approx(4 * TRAINED / 8)
    layer = MAPS / 32
    copies = 2 * (layer + (whole - LORA - MAPS - 32000 * 4096) + LORA)
    assert memory["weights"] == pytest.approx(4 * whole / 8 + copies, rel=0.02), "an eighth, and bf16 copies of a layer"
    states = 16384 * 4 * 4096 * 32  # float32 states of a chunk, between the layers that are computed again
    assert states < memory["activations"] < 4 * states
    assert sum(value for name, value in memory.items() if name != "total") == pytest.approx(memory["total"])
    assert plan["stages"]["stage_1"]["fits"] and 16 * GIB < memory["total"] < 79.6 * GIB
    for part in ("process", "weights", "gradients", "optimiser", "activations", "buffers"):
        assert f"{part} {memory[part] / GIB:.2f}" in text


def test_storage(plan: dict[str, Any], text: str) -> None:
    storage, model = plan["storage_bytes"], 4 * 7_851_016_192
    assert storage["streams"] == pytest.approx(4 * TOKENS * 38 / 20), "4 bytes a token; 18,000 more steps of stage 2"
    assert storage["model folders"] == 3 * model and storage["registry"] == model, "untrained, and after each stage"
    checkpoints = storage["checkpoints while a stage runs"] / (12 * TRAINED)
    assert checkpoints == int(checkpoints) >= 2
    assert "model folders" in text and f"{3 * model / GIB:,.1f} GiB" in text


def test_hours_and_cost(plan: dict[str, Any], text: str) -> None:
    seconds = {step["name"]: step["seconds"] for step in plan["steps"]}
    arithmetic = plan["stages"]["stage_1"]["flops"] / (8 * 989e12 * 0.35)
    assert 1.0 < seconds["train_stage_1"] / arithmetic < 1.3, "launches, exchange and checkpoints are little of it"
    assert 36 < seconds["train_stage_1"] / 3600 < 48
    assert seconds["train_stage_2"] == pytest.approx(0.9 * seconds["train_stage_1"], rel=0.01), "18,000 steps of 20,000"
    known = sum(value for value in seconds.values() if value is not None)
    assert plan["seconds"] == pytest.approx(known) and plan["cost"] == pytest.approx(55 * known / 3600)
    assert f"cost {plan['cost']:,.2f}" in text and f"{known / 3600:,.1f} h" in text
