"""Stopped anywhere and resumed = never stopped: bit-equal losses, weights and sample ids, for every engine.

Here a run ends by an exception and goes on in the same process group; `test_kill.py` does it with kill -9 under Ray.
Dropout is on: the random numbers have to be the same too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from training_kit import read_result, relative, run_ranks, tiny_folder, train_job

from nvembed.training.config import TrainConfig

STEPS, EVERY, STOP = 6, 2, 5  # stopped while step 5 is read: steps 0-4 are done, 0-3 are in a checkpoint
FULL = {"type": "full", "freeze_embeddings": True}
LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.2}
ADAPTERS = {"full": FULL, "lora": LORA}


def settings(engine: str, adapter: str, precision: str, **more: Any) -> dict[str, Any]:
    return {
        "objective": {"type": "contrastive", "learned_temperature": True, "temperature": 0.1},
        "adapter": ADAPTERS[adapter],
        "optimiser": {"learning_rate": 2e-3, "weight_decay": 0.1, "warmup_steps": 2, "eps": 1e-5},
        "engine": {"type": "torch"} if engine == "torch" else {"type": "deepspeed", "zero_stage": int(engine[-1])},
        "precision": precision,
        "token_budget": 120,
        "checkpoint_every": EVERY,
        "seed": 7,
        **more,
    }


CROSSING = "zero3"
DEFAULT = [("torch", "lora", "fp32"), ("zero2", "full", "fp32"), ("zero3", "lora", "bf16")]
EVERYTHING = [
    (engine, adapter, precision)
    for engine in ("torch", "zero0", "zero1", "zero2", "zero3")
    for adapter in ADAPTERS
    for precision in ("fp32", "bf16")
]


def metrics(work: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def weights(work: Path) -> dict[str, bytes]:
    files = [*work.glob("model/**/*.safetensors"), work / "objective.safetensors"]
    assert len(files) >= 3
    return {str(file.relative_to(work)): file.read_bytes() for file in files}


def run_pairs(folder: Path, combinations: list[tuple[str, str, str]], crossing: str | None = None) -> Path:
    """Each combination without a stop, and with one; two ranks, one start of the processes.

    Args:
        crossing: an engine whose runs that change the number of ranks share that start.
    """
    model = str(tiny_folder(folder / "start"))
    jobs = crossing_jobs(folder, crossing) if crossing else {}
    for combination in combinations:
        name = "-".join(combination)
        runs = [
            (f"{folder}/{name}-whole", None),
            (f"{folder}/{name}-stopped", STOP),
            (f"{folder}/{name}-stopped", None),
        ]
        jobs[name] = {"config": settings(*combination), "model": model, "runs": runs}
    run_ranks("train", jobs, folder / "ranks")
    return folder


ALONE = settings("torch", "full", "fp32", token_budget=100_000)


def crossing_jobs(folder: Path, engine: str) -> dict[str, Any]:
    """Runs of two ranks that go on from, or are continued by, one process; its own part is trained here."""
    model = folder / "start"
    train_job(ALONE, model, folder / "whole")
    train_job(ALONE, model, folder / "one-two", interrupt=STOP)
    config = settings(engine, "full", "fp32")
    return {
        "first": {"config": config, "model": str(model), "runs": [(f"{folder}/two-one", STOP)]},
        "second": {"config": config, "model": str(model), "runs": [(f"{folder}/one-two", None)]},
    }


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_pairs(tmp_path_factory.mktemp("resume"), DEFAULT, CROSSING)


def assert_pair(folder: Path, name: str) -> None:
    facts, _ = read_result(folder / "ranks", name)
    assert facts["starts"] == [0, 0, 4]
    whole, stopped = folder / f"{name}-whole", folder / f"{name}-stopped"
    assert [row["step"] for row in metrics(whole)] == list(range(STEPS))
    assert metrics(whole) == metrics(stopped)
    assert weights(whole) == weights(stopped)
    assert len({row["loss"] for row in metrics(whole)}) == STEPS
    assert metrics(whole)[0]["chunks"] >= 2
    assert all(row["negative_similarity"] < row["hardest_similarity"] <= 1 for row in metrics(whole))
    begun = {work: (work / "starts.jsonl").read_text().splitlines() for work in (whole, stopped)}
    assert [[json.loads(line)["step"] for line in lines] for lines in begun.values()] == [[0], [0, 4]]


@pytest.mark.parametrize("combination", DEFAULT, ids="-".join)
def test_resume_is_bit_equal(pairs: Path, combination: tuple[str, str, str]) -> None:
    assert_pair(pairs, "-".join(combination))


@pytest.mark.slow
def test_resume_is_bit_equal_for_every_combination(tmp_path: Path) -> None:
    folder = run_pairs(tmp_path, EVERYTHING)
    for combination in EVERYTHING:
        assert_pair(folder, "-".join(combination))


@pytest.mark.parametrize(
    "engine",
    [pytest.param("torch", marks=pytest.mark.slow), pytest.param("zero2", marks=pytest.mark.slow), CROSSING],
)
def test_a_run_goes_on_with_another_number_of_ranks(pairs: Path, tmp_path: Path, engine: str) -> None:
    """Without dropout, 2 -> 1 and 1 -> 2 ranks give the losses and weights of an uninterrupted run."""
    folder = pairs if engine == CROSSING else run_pairs(tmp_path, [], engine)
    assert train_job(ALONE, folder / "start", folder / "two-one") == 4
    assert read_result(folder / "ranks", "second")[0]["starts"] == [4]
    expected = metrics(folder / "whole")
    for name in ("two-one", "one-two"):
        rows = metrics(folder / name)
        assert [row["sample_ids_sha256"] for row in rows] == [row["sample_ids_sha256"] for row in expected]
        for key in ("loss", "positive_similarity", "negative_similarity", "hardest_similarity"):
            assert [row[key] for row in rows] == pytest.approx([row[key] for row in expected], rel=1e-5), key
        for file in weights(folder / name):
            ours, theirs = load_file(folder / name / file), load_file(folder / "whole" / file)
            assert {
                key: relative(ours[key], theirs[key]) for key in theirs if relative(ours[key], theirs[key]) > 1e-5
            } == {}


def test_settings_are_those_of_the_recipe() -> None:
    assert TrainConfig.model_validate(settings("zero3", "lora", "bf16")).engine.zero_stage == 3
