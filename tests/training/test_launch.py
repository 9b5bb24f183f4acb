"""The `train` step under real Ray Train: published once, short errors, refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_kit import tiny_start, tiny_stream

from nvembed.core.lease import LeaseLostError
from nvembed.modeling.folder import load_embedder
from nvembed.training.config import TrainConfig
from nvembed.training.errors import NonFiniteError, TrainingError
from nvembed.training.launch import TRAIN, connect, explain, worker_environment
from nvembed.types import UserError

CONFIG: dict[str, Any] = {
    "objective": {"type": "contrastive", "learned_temperature": True, "temperature": 0.1},
    "optimiser": {"learning_rate": 1e-3},
    "engine": {"type": "deepspeed", "zero_stage": 2},
    "precision": "fp32",
    "num_workers": 2,
    "token_budget": 120,
    "checkpoint_every": 2,
    "max_failures": 1,
}


def inputs(folder: Path, steps: int = 3) -> dict[str, Any]:
    return {"stream": tiny_stream(folder / "stream", steps), "model": tiny_start(folder / "start")}


@pytest.mark.ray
def test_train_step_publishes_a_model_folder_and_metrics(tmp_path: Path, ray_session: None) -> None:
    given, config = inputs(tmp_path), TrainConfig.model_validate(CONFIG)
    artifact = TRAIN.run(config, given, str(tmp_path / "stage"))
    assert artifact.manifest["rows"] == {"steps": 3, "examples": 24}
    rows = [json.loads(line) for line in (tmp_path / "stage" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all({"loss", "lr", "grad_norm", "sample_ids_sha256", "tokens", "seconds"} <= set(row) for row in rows)
    assert artifact.manifest["metrics"]["last_loss"] == rows[-1]["loss"]
    names = set(artifact.manifest["files"])
    assert {"metrics.jsonl", "starts.jsonl", "objective.safetensors", "model/model.safetensors"} <= names
    assert not [name for name in names if name.startswith(("checkpoints", ".tmp"))]
    assert sorted(path.name for path in (tmp_path / "stage").iterdir() if path.is_dir()) == ["model"]
    before, after = (load_embedder(tmp_path / name / "model") for name in ("start", "stage"))
    assert np.abs(before.encode(["one two"]) - after.encode(["one two"])).max() > 1e-4
    again = TRAIN.run(config, given, str(tmp_path / "stage"))
    assert again.manifest == artifact.manifest


@pytest.mark.ray
def test_a_workers_error_is_short_and_is_not_tried_again(tmp_path: Path, ray_session: None) -> None:
    config = TrainConfig.model_validate(CONFIG | {"objective": {"type": "distill"}})
    with pytest.raises(UserError) as caught:
        TRAIN.run(config, inputs(tmp_path), str(tmp_path / "stage"))
    assert str(caught.value) == "objective.type is distill, but the stream has no teacher vectors (see distill_stream)."
    assert len((tmp_path / "stage" / "starts.jsonl").read_text().splitlines()) == 1


@pytest.mark.ray
def test_more_workers_than_the_cluster_holds_are_refused(ray_session: None) -> None:
    with pytest.raises(UserError, match="num_workers 9 need 9 CPUs together, this Ray has 4"):
        connect(TrainConfig.model_validate(CONFIG | {"num_workers": 9}))
    with pytest.raises(UserError, match="need 2 GPUs together, this Ray has 0"):
        connect(TrainConfig.model_validate(CONFIG | {"gpus_per_worker": 1}))


def test_a_batch_that_cannot_be_divided_is_refused_before_ray(tmp_path: Path) -> None:
    config = TrainConfig.model_validate(CONFIG | {"num_workers": 3})
    with pytest.raises(UserError, match="global_batch_size 8 cannot be divided by"):
        TRAIN.run(config, inputs(tmp_path), str(tmp_path / "stage"))


class Failure(Exception):
    def __init__(self, failures: dict[int, BaseException]) -> None:
        super().__init__("Training failed due to worker errors:\n" + "trace\n" * 200)
        self.worker_failures = failures


class Wrapped(Exception):
    def __init__(self, cause: BaseException) -> None:
        super().__init__("a long trace")
        self._base_exc = cause


def test_errors_are_explained_by_the_rank_that_caused_them() -> None:
    peer = RuntimeError("Connection closed by peer [127.0.0.1]:1\nmore")
    mistake = UserError("wrong")
    assert explain(Failure({0: Wrapped(peer), 1: Wrapped(mistake)})) == (mistake, False)
    for fatal in (NonFiniteError("nan"), LeaseLostError("gone")):
        assert explain(Failure({0: Wrapped(fatal)})) == (fatal, False)
    error, again = explain(Failure({0: Wrapped(peer), 1: Wrapped(KeyError("q_proj"))}))
    assert isinstance(error, TrainingError) and not again and str(error) == "rank 1 failed: KeyError: 'q_proj'"
    error, again = explain(Failure({0: Wrapped(peer), 1: OSError("disk away")}))
    assert again and "rank 0: RuntimeError: Connection closed by peer [127.0.0.1]:1; rank 1: OSError" in str(error)
    error, again = explain(ValueError("controller\nlines"))
    assert again and str(error) == "training failed: controller"


def test_workers_get_their_threads_and_a_compiler_cache_of_their_own() -> None:
    config = TrainConfig.model_validate(CONFIG | {"threads_per_worker": 3})
    first, second = worker_environment(config), worker_environment(config)
    assert first["OMP_NUM_THREADS"] == "3" and first["DS_ACCELERATOR"] == "cpu"
    assert first["TORCH_EXTENSIONS_DIR"] != second["TORCH_EXTENSIONS_DIR"]
    assert "DS_ACCELERATOR" not in worker_environment(TrainConfig.model_validate(CONFIG | {"gpus_per_worker": 1}))
