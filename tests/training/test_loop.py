"""The loop alone, in one process: what stops it, what it leaves behind, what its random numbers depend on.

Its steps are tested in test_equality.py, its resumes in test_resume.py, its losses in test_golden.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import MemoryStream, tiny_folder

from nvembed.core.lease import Lease, LeaseLostError
from nvembed.training.build import TrainingSpec
from nvembed.training.checkpoint import CheckpointStore, Identity
from nvembed.training.config import TrainConfig
from nvembed.training.errors import NonFiniteError
from nvembed.training.loop import check_batch, seed_step, train
from nvembed.training.worker import PlainContext
from nvembed.types import UserError

CONFIG: dict[str, Any] = {
    "adapter": {"type": "full"},
    "engine": {"type": "torch"},
    "precision": "fp32",
    "optimiser": {"learning_rate": 1e-3, "weight_decay": 0.1},
}


class PoisonedStream(MemoryStream):
    """Teacher vectors of one step are not numbers."""

    def batches(self, start: int) -> Any:
        for batch in super().batches(start):
            if batch.step == 3:
                assert batch.teacher_vectors is not None
                batch.teacher_vectors[1, 0] = float("nan")
            yield batch


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "start")
    config = TrainConfig.model_validate(CONFIG | {"objective": {"type": "distill"}, "checkpoint_every": 2})
    stream = PoisonedStream(6, size=4, group=1, teacher_dim=48)
    spec = TrainingSpec(config, "memory", str(model), str(tmp_path / "work"), {})
    with pytest.raises(NonFiniteError, match="loss is nan at step 3; examples step3-example0, step3-example1, "):
        train(spec, stream, PlainContext())
    store = CheckpointStore(str(tmp_path / "work"), Identity(config, {}, "fp32", 1))
    found = store.newest(PlainContext())
    assert found is not None and found.step == 2
    steps = [json.loads(line)["step"] for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


def test_a_run_whose_output_was_taken_over_stops_writing(tmp_path: Path) -> None:
    model, work = tiny_folder(tmp_path / "start"), tmp_path / "out" / "stage"
    config = TrainConfig.model_validate(CONFIG)
    with Lease(str(tmp_path / "out")) as lease:
        context = PlainContext(lease_uri=lease.uri, fence=lease.fence)

        class Taken(MemoryStream):
            def batches(self, start: int) -> Any:
                for batch in super().batches(start):
                    if batch.step == 2:  # what the next run's Lease writes
                        file = tmp_path / "out" / ".lease.json"
                        file.write_text(json.dumps(json.loads(file.read_text()) | {"fence": lease.fence + 1}))
                    yield batch

        with pytest.raises(LeaseLostError, match="taken over"):
            train(TrainingSpec(config, "memory", str(model), str(work), {}), Taken(4), context)
    assert [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize(("size", "workers", "advice"), [(7, 2, "Use 6"), (3, 4, "Use 4")])
def test_a_batch_that_cannot_be_divided_is_refused_with_both_numbers(size: int, workers: int, advice: str) -> None:
    with pytest.raises(UserError, match=f"{size} cannot be divided by train.num_workers {workers}. {advice}"):
        check_batch(size, workers)
    check_batch(8, 4)


def test_random_numbers_of_a_step_depend_on_seed_step_and_rank_alone() -> None:
    drawn = {}
    for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 23, 0), (12, 3, 0)]:
        torch.rand(5)
        seed_step(*key)
        drawn[key] = torch.rand(4)
        seed_step(*key)
        assert torch.equal(drawn[key], torch.rand(4))
    assert len({tuple(value.tolist()) for value in drawn.values()}) == 6
