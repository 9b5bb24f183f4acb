"""One process = two ranks = chunked backward, ZeRO 0-3, LoRA and full: losses, gradients, parameters.

Everything is compared with one process, plain torch, one forward for the whole global batch.
Exactness as DESIGN.md defines it: fp32, dropout 0, per-tensor relative norm at most 1e-5; AdamW with eps >= 1e-6.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import engine_section, read_result, relative, run_ranks, run_steps

from nvembed.training.config import TrainConfig

TOLERANCE = 1e-5
CLIP = 0.5
WHOLE, SMALL, UNEVEN = 100_000, 120, 85  # token budgets: one chunk a rank; several; more on one rank than the other
SLICE, SLICED = 60, 200  # tokens of a slice; budget of chunks that hold several

FULL = {"type": "full", "freeze_embeddings": False}
LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0}
CONTRASTIVE = {
    "type": "contrastive", "in_batch": True, "query_negatives": True, "temperature": 0.05,
    "learned_temperature": True, "matryoshka_dims": [16],
}  # fmt: skip
DISTILL = {"type": "distill", "matryoshka_dims": [16], "similarity_weight": 0.5}


def settings(
    engine: str, stage: int, adapter: dict[str, Any], budget: int, optimiser: str = "sgd",
    objective: dict[str, Any] = CONTRASTIVE, **engine_keys: Any,
) -> dict[str, Any]:  # fmt: skip
    """A TrainConfig as JSON."""
    rate = 1e-2 if optimiser == "sgd" else 1e-3
    return {
        "objective": objective,
        "adapter": adapter,
        "optimiser": {
            "type": optimiser, "learning_rate": rate, "head_learning_rate": 2 * rate, "weight_decay": 0.1, "eps": 1e-5,
            "clip_norm": CLIP,
        },
        "engine": {**engine_section(engine, stage), **engine_keys},
        "precision": "fp32",
        "token_budget": budget,
    }  # fmt: skip


def engines() -> list[tuple[str, int]]:
    return [("torch", 0), *(("deepspeed", stage) for stage in range(4))]


def jobs() -> dict[str, dict[str, Any]]:
    """Every job of the two-rank run, by name."""
    made: dict[str, dict[str, Any]] = {}
    for engine, stage in engines():
        for kind, adapter in (("full", FULL), ("lora", LORA)):
            for cut, budget in (("whole", WHOLE), ("chunked", SMALL)):
                for optimiser in ("sgd", "adamw") if cut == "chunked" else ("adamw",):
                    made[f"{engine}{stage}-{kind}-{cut}-{optimiser}"] = {
                        "config": settings(engine, stage, adapter, budget, optimiser)
                    }
        made[f"{engine}{stage}-distill"] = {"config": settings(engine, stage, FULL, SMALL // 2, "adamw", DISTILL)}
    for stage in (2, 3):
        checkpointing = settings("deepspeed", stage, LORA, SMALL, "adamw", gradient_checkpointing=True)
        offload = settings("deepspeed", stage, FULL, SMALL, "adamw", offload_optimizer=True)
        made[f"deepspeed{stage}-checkpointing"] = {"config": checkpointing}
        made[f"deepspeed{stage}-offload"] = {"config": offload}
        made[f"deepspeed{stage}-uneven"] = {"config": settings("deepspeed", stage, FULL, UNEVEN, "adamw")}
        for cut, budget in (("whole", WHOLE), ("chunked", SLICED)):
            config = settings("deepspeed", stage, FULL, budget, "adamw")
            made[f"deepspeed{stage}-sliced-{cut}"] = {"config": config, "slice_budget": SLICE}
    for engine, stage in engines():
        made[f"infinite-{engine}{stage}"] = {"config": settings(engine, stage, FULL, SMALL), "case": "infinite"}
    for stage in (1, 2):
        made[f"naive{stage}"] = {"config": settings("deepspeed", stage, FULL, SMALL, "sgd"), "naive": True}
    return made


# One of each kind runs by default; the others, which differ in engine, stage or cut only, are slow.
DEFAULT = {
    "torch0-full-chunked-adamw", "torch0-lora-whole-adamw", "deepspeed0-full-chunked-sgd",
    *(f"deepspeed{stage}-{kind}-chunked-adamw" for stage in (1, 2, 3) for kind in ("full", "lora")),
    "deepspeed3-full-whole-adamw", "deepspeed3-distill", "deepspeed2-offload", "deepspeed3-checkpointing",
    "deepspeed3-uneven", "deepspeed3-sliced-chunked", "infinite-torch0", "infinite-deepspeed3", "naive1",
}  # fmt: skip
assert set(jobs()) > DEFAULT


def with_slow(names: Iterable[str]) -> list[Any]:
    """Parameters of a test over jobs."""
    return [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in names]


class Results:
    """Results of two gloo ranks; one start of the processes runs all default jobs, another all slow ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        folder = self.folder / ("default" if name in DEFAULT else "slow")
        if not folder.exists():
            run_ranks(
                "equality", {key: job for key, job in jobs().items() if (key in DEFAULT) == (name in DEFAULT)}, folder
            )
        return read_result(folder, name)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("equality"))


@functools.cache
def reference(adapter: str, optimiser: str, objective: str) -> Any:
    """One process, plain torch, the whole batch in one forward."""
    config = settings(
        "torch", 0, LORA if adapter == "lora" else FULL, WHOLE, optimiser,
        DISTILL if objective == "distill" else CONTRASTIVE,
    )  # fmt: skip
    return run_steps(TrainConfig.model_validate(config))


def assert_equal(facts: dict[str, Any], tensors: dict[str, Any], config: dict[str, Any]) -> None:
    expected_facts, expected = reference(
        config["adapter"]["type"], config["optimiser"]["type"], config["objective"]["type"]
    )
    assert expected_facts["chunks"] == [1]
    assert min(expected_facts["norms"]) > CLIP, "clipping is not active"
    assert facts["losses"] == pytest.approx(expected_facts["losses"], rel=TOLERANCE)
    assert facts["norms"] == pytest.approx(expected_facts["norms"], rel=TOLERANCE)
    assert set(tensors) == set(expected)
    wrong = {name: relative(tensors[name], expected[name]) for name in expected}
    assert all(error == 0 for name, error in wrong.items() if name.startswith("initial/")), (
        "initialising changed weights"
    )
    assert {name: error for name, error in wrong.items() if error > TOLERANCE} == {}
    moved = [name for name in tensors if name.startswith("parameters/")]
    assert all(relative(tensors[name], tensors[name.replace("parameters", "initial")]) > 1e-6 for name in moved)


@pytest.mark.parametrize("name", with_slow(name for name in jobs() if not name.startswith(("naive", "infinite"))))
def test_two_ranks_equal_one_process(results: Results, name: str) -> None:
    facts, tensors = results[name]
    config = jobs()[name]["config"]
    assert_equal(facts, tensors, config)
    assert len(set(facts["chunks"])) == 1, "ZeRO-3 needs the same number of chunks on every rank"
    assert (facts["slices"] > facts["chunks"][0]) == ("sliced" in name)
    assert (facts["empty_slices"] > 0) == name.endswith("uneven")
    if config["token_budget"] == WHOLE:
        assert facts["chunks"] == [1, 1]
    else:
        assert facts["chunks"][0] >= 2


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_state_is_really_partitioned(results: Results, stage: int, kind: str) -> None:
    facts, _ = results[f"deepspeed{stage}-{kind}-chunked-adamw"]
    held = facts["partition"]
    assert held["stage"] == stage
    assert held["trained"] / 2 <= held["held"] <= held["trained"] / 2 + 64, "masters and moments are not halved"
    if stage == 3:
        assert held["whole"] / 2 <= held["resident"] <= held["whole"] / 2 + 64, "weights are not halved"
        assert held["gathered"] == 0, "weights stay gathered between forwards"
    else:
        assert held["gradients_partitioned"] == (stage == 2)


@pytest.mark.parametrize("name", with_slow(["naive1", "naive2"]))
def test_several_backwards_without_coalescing_are_wrong(results: Results, name: str) -> None:
    """Negative control: DeepSpeed says nothing, only the numbers do (PLATFORM.md 0.1)."""
    facts, tensors = results[name]
    expected_facts, expected = reference("full", "sgd", "contrastive")
    assert facts["losses"][0] == pytest.approx(expected_facts["losses"][0], rel=TOLERANCE)  # same first forward
    assert facts["norms"][0] != pytest.approx(expected_facts["norms"][0], rel=0.01)
    weights = [name for name in expected if name.startswith("parameters/")]
    assert max(relative(tensors[name], expected[name]) for name in weights) > 100 * TOLERANCE


@pytest.mark.parametrize("name", with_slow(f"infinite-{engine}{stage}" for engine, stage in engines()))
def test_a_gradient_that_is_not_finite_on_one_rank_stops_every_rank(results: Results, name: str) -> None:
    facts, _ = results[name]
    assert len(facts["messages"]) == 2
    for message in facts["messages"]:
        assert message.startswith("the gradient norm is ") and "at step 0; examples step0-example0, " in message


@pytest.mark.parametrize("budget", [40, 100, 200])
@pytest.mark.parametrize(
    ("adapter", "objective"), [("full", "contrastive"), ("lora", "contrastive"), ("full", "distill")]
)
def test_chunked_backward_of_one_process_equals_one_backward(budget: int, adapter: str, objective: str) -> None:
    config = settings(
        "torch", 0, LORA if adapter == "lora" else FULL, budget, "adamw",
        DISTILL if objective == "distill" else CONTRASTIVE,
    )  # fmt: skip
    facts, tensors = run_steps(TrainConfig.model_validate(config))
    assert facts["chunks"][0] >= 2
    assert_equal(facts, tensors, config)


def test_bf16_is_as_near_to_fp32_chunked_as_whole() -> None:
    """Autocast over fp32 weights: rounding of bf16, about 0.5 % of the gradient, and no more for being chunked."""
    runs = {}
    for precision in ("fp32", "bf16"):
        for budget in (WHOLE, SMALL):
            config = settings("torch", 0, FULL, budget) | {"precision": precision}
            runs[precision, budget] = run_steps(TrainConfig.model_validate(config), steps=1)[1]

    def error(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
        names = [name for name in theirs if name.startswith("gradient/")]
        flat = [torch.cat([tensors[name].flatten() for name in names]) for tensors in (ours, theirs)]
        return relative(flat[0], flat[1])

    exact = runs["fp32", WHOLE]
    assert 1e-4 < error(runs["bf16", WHOLE], exact) < 0.02
    assert 1e-4 < error(runs["bf16", SMALL], exact) < 0.02
    assert error(runs["bf16", SMALL], runs["bf16", WHOLE]) < 0.02
