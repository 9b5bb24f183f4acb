"""The same sums on a CUDA device as on the CPU; every engine, one rank. Skipped where there is no device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_kit import (
    INSTRUCTION,
    engine_section,
    read_result,
    relative,
    run_ranks,
    run_steps,
    tiny_embedder,
    tiny_folder,
    train_job,
)

from nvembed.modeling.bidirectional import attends_ahead
from nvembed.training.config import TrainConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ENGINES = [("torch", 0), *(("deepspeed", stage) for stage in range(4))]
ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"type": "full", "freeze_embeddings": False},
    "lora": {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0},
}
ACROSS_DEVICES = 1e-4  # other kernels, other order of summation
ACROSS_ENGINES = 1e-5
TEXTS = ["short", "a somewhat longer text about the sea", "?", "Größe und Maß " * 6]


def settings(engine: str, stage: int, adapter: dict[str, Any], precision: str = "fp32") -> dict[str, Any]:
    """A TrainConfig as JSON: several chunks, clipping active."""
    return {
        "objective": {"type": "contrastive", "in_batch": True, "temperature": 0.05, "matryoshka_dims": [16]},
        "adapter": adapter,
        "optimiser": {"type": "adamw", "learning_rate": 1e-3, "eps": 1e-5, "clip_norm": 0.5},
        "engine": engine_section(engine, stage),
        "precision": precision,
        "token_budget": 120,
        "checkpoint_every": 2,
    }


def name(engine: str, stage: int, adapter: str) -> str:
    return f"{engine}{stage}-{adapter}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every engine and adapter on the device, in one process."""
    folder = tmp_path_factory.mktemp("gpu")
    jobs = {
        name(engine, stage, adapter): {"config": settings(engine, stage, ADAPTERS[adapter])}
        for engine, stage in ENGINES
        for adapter in ADAPTERS
    }
    run_ranks("equality", jobs, folder, world=1, device="cuda")
    return folder


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_device_trains_like_the_processor(results: Path, adapter: str) -> None:
    expected, tensors = run_steps(TrainConfig.model_validate(settings("torch", 0, ADAPTERS[adapter])))
    facts, found = read_result(results, name("torch", 0, adapter))
    assert facts["losses"] == pytest.approx(expected["losses"], rel=ACROSS_DEVICES)
    gradients = {key: relative(found[key], tensors[key]) for key in tensors if key.startswith("gradient/")}
    assert gradients and max(gradients.values()) <= ACROSS_DEVICES, max(gradients.items(), key=lambda item: item[1])


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("stage", range(4))
def test_zero_stages_on_the_device_equal_plain_torch(results: Path, stage: int, adapter: str) -> None:
    expected, tensors = read_result(results, name("torch", 0, adapter))
    facts, found = read_result(results, name("deepspeed", stage, adapter))
    assert facts["losses"] == pytest.approx(expected["losses"], rel=ACROSS_ENGINES)
    gradients = {key: relative(found[key], tensors[key]) for key in tensors if key.startswith("gradient/")}
    assert gradients and max(gradients.values()) <= ACROSS_ENGINES, max(gradients.items(), key=lambda item: item[1])


@pytest.mark.parametrize(("precision", "least_cosine"), [("fp32", 1 - 1e-6), ("bf16", 0.999)])
def test_vectors_of_the_device_are_those_of_the_processor(precision: str, least_cosine: float) -> None:
    embedder = tiny_embedder().eval()
    expected = embedder.encode(TEXTS, prompt=INSTRUCTION)
    found = embedder.to("cuda").encode(TEXTS, prompt=INSTRUCTION, precision=precision)
    assert (expected * found).sum(axis=1).min() >= least_cosine
    if precision == "fp32":
        assert np.abs(expected - found).max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_bidirectional_on_the_device(dtype: torch.dtype) -> None:
    model = tiny_embedder().embedding_model.to("cuda")
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        assert attends_ahead(model)


@pytest.mark.parametrize(("engine", "stage"), [("torch", 0), ("deepspeed", 2), ("deepspeed", 3)])
def test_a_run_on_the_device_resumes_where_it_was(tmp_path: Path, engine: str, stage: int) -> None:
    """bf16, interrupted after step 5 of 6 with a checkpoint at 4: the same losses as the uninterrupted run.

    Bit-equality is promised for one machine type; the kernels of these shapes give it here.
    """
    config = settings(engine, stage, ADAPTERS["lora"], "bf16")
    model = tiny_folder(tmp_path / "model")
    runs = [(str(tmp_path / "whole"), None), (str(tmp_path / "cut"), 5), (str(tmp_path / "cut"), None)]
    job = {"case": "train", "config": config, "model": str(model), "runs": runs}
    run_ranks("train", {"job": job}, tmp_path / "ranks", world=1, device="cuda")
    facts, _ = read_result(tmp_path / "ranks", "job")
    assert facts["starts"] == [0, 0, 4]
    whole, cut = (metric_rows(tmp_path / run) for run in ("whole", "cut"))
    assert len(whole) == 6 and cut == whole


def metric_rows(work: Path) -> list[tuple[Any, ...]]:
    import json

    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["sample_ids_sha256"]) for row in rows]


def test_the_plain_loop_uses_the_device(tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert train_job(settings("torch", 0, ADAPTERS["full"]), tiny_folder(tmp_path / "model"), work, steps=2) == 0
    assert (work / "model" / "nvembed.json").is_file() and torch.cuda.max_memory_allocated() > 0
