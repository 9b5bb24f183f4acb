"""Checkpoints: the newest complete one wins, damage is seen and named, what does not belong is refused."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import CPU, MemoryStream, tiny_folder, tiny_model, train_job

from nvembed.core import storage
from nvembed.core.steps import ChangedRecipeError, CorruptArtifactError
from nvembed.training import checkpoint as checkpoint_module
from nvembed.training.checkpoint import CheckpointStore, Identity
from nvembed.training.config import TrainConfig
from nvembed.training.engine import build_engine
from nvembed.training.loop import optimiser_step
from nvembed.training.sharding import shard
from nvembed.training.worker import PlainContext
from nvembed.types import UserError

CONFIG: dict[str, Any] = {
    "adapter": {"type": "full"},
    "engine": {"type": "torch"},
    "precision": "fp32",
    "keep_checkpoints": 2,
    "optimiser": {"learning_rate": 1e-3, "weight_decay": 0.1},
}


def identity(**changes: Any) -> Identity:
    config = TrainConfig.model_validate(CONFIG | changes)
    return Identity(config, {"stream": "s", "model": "m"}, "fp32", 1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run of three checkpoints, two of them kept."""
    ident = identity()
    model = tiny_model(ident.config)
    engine = build_engine(model, ident.config.optimiser, ident.config.engine, CPU)
    store, context = CheckpointStore(str(tmp_path), ident), PlainContext()
    for batch in MemoryStream(3).batches(0):
        optimiser_step(engine, shard(batch, 100_000, 0, 1), 1.0)
        store.save(engine, batch.step + 1, context)
    assert [report["step"] for report in context.reports] == [1, 2, 3]
    return tmp_path


def newest(work: Path, **changes: Any) -> int | None:
    found = CheckpointStore(str(work), identity(**changes)).newest(PlainContext())
    return found.step if found else None


def test_keeps_the_newest_and_reads_back_every_tensor(saved: Path) -> None:
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    found = CheckpointStore(str(saved), identity()).newest(PlainContext())
    assert found is not None and found.step == 3
    names = {path.name for path in (saved / "checkpoints" / "step-000003").iterdir()}
    assert names == {
        "parameters-00000.safetensors", "exp_avg-00000.safetensors", "exp_avg_sq-00000.safetensors", "state.json",
        "manifest.json",
    }  # fmt: skip
    config = identity().config
    fresh = tiny_model(config, seed=1)
    found.load_parameters(fresh)
    engine = build_engine(fresh, config.optimiser, config.engine, CPU)
    engine.load_moments(found.read, found.step)
    for kind in ("parameters", "exp_avg", "exp_avg_sq"):
        for name, tensor in engine.tensors(kind):
            assert torch.equal(tensor, found.read(kind, name)) and float(tensor.abs().sum()) > 0
    trained = {name for name, _ in fresh.trainable()}
    assert "embedder.embedding_model.embed_tokens.weight" not in trained  # frozen: stays in the input folder
    with pytest.raises(CorruptArtifactError, match="another model"):
        found.read("parameters", "embedder.embedding_model.embed_tokens.weight")


def test_large_state_is_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "FILE_BYTES", 40_000)
    ident = identity()
    engine = build_engine(tiny_model(ident.config), ident.config.optimiser, ident.config.engine, CPU)
    store = CheckpointStore(str(tmp_path), ident)
    store.save(engine, 1, PlainContext())
    files = sorted((tmp_path / "checkpoints" / "step-000001").glob("parameters-*"))
    assert len(files) >= 3 and all(file.stat().st_size < 50_000 for file in files)
    found = store.newest(PlainContext())
    assert found is not None
    assert all(torch.equal(tensor, found.read("parameters", name)) for name, tensor in engine.tensors("parameters"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "no manifest"])
def test_a_damaged_newest_falls_back_and_is_named(saved: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved / "checkpoints" / "step-000003"
    victim = folder / ("manifest.json" if "manifest" in damage else "exp_avg-00000.safetensors")
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(content)
    elif damage in ("truncate", "manifest"):
        victim.write_bytes(victim.read_bytes()[:100])
    else:
        victim.unlink()
    with caplog.at_level(logging.WARNING):
        assert newest(saved) == 2
    assert victim.name in caplog.text and "step-000003" in caplog.text


def test_none_complete_means_from_the_start(saved: Path) -> None:
    for path in (saved / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    assert newest(saved) is None
    assert newest(saved / "nowhere") is None


def test_another_recipe_is_refused_with_the_difference(saved: Path) -> None:
    with pytest.raises(ChangedRecipeError, match=r"config.optimiser.learning_rate: 0.001 -> 0.5"):
        newest(saved, optimiser={"learning_rate": 0.5, "weight_decay": 0.1})
    other = Identity(identity().config, {"stream": "other", "model": "m"}, "fp32", 1)
    with pytest.raises(ChangedRecipeError, match=r'inputs\.stream: "s" -> "other"'):
        CheckpointStore(str(saved), other).newest(PlainContext())


def test_another_number_of_threads_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match=r"1 threads per worker, now there are 2.*threads_per_worker to 1"):
        newest(saved, threads_per_worker=2)


def test_the_launcher_sees_the_same_but_for_what_depends_on_the_workers_machines(saved: Path) -> None:
    ident = identity()
    other = Identity(ident.config, ident.inputs, "bf16", 1)
    assert CheckpointStore(str(saved), other).preview() == 3
    with pytest.raises(ChangedRecipeError, match="precision"):
        CheckpointStore(str(saved), other).newest(PlainContext())
    assert CheckpointStore(str(saved / "nowhere"), other).preview() == 0
    with pytest.raises(UserError, match="threads_per_worker to 1"):
        CheckpointStore(str(saved), identity(threads_per_worker=2)).preview()


def test_other_circumstances_are_logged(
    saved: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = checkpoint_module.versions()
    monkeypatch.setattr(checkpoint_module, "versions", lambda: here | {"torch": "9.9"})
    with caplog.at_level(logging.WARNING):
        assert newest(saved, num_workers=1, token_budget=99) == 3
    assert 'versions.torch: "' in caplog.text and '-> "9.9": bit-equality is not promised' in caplog.text
    assert "token_budget" in caplog.text and "num_workers" not in caplog.text


def test_a_checkpoint_needs_no_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    train_job({"engine": {"type": "torch"}}, tiny_folder(tmp_path / "start"), tmp_path / "work", steps=1)
    (checkpoint,) = (tmp_path / "work" / "checkpoints").glob("step-*/state.json")
    found = json.loads(checkpoint.read_text())["versions"]
    assert found["torch"] == installed("torch") and "deepspeed" not in found


def test_resume_works_where_files_cannot_be_appended_to(tmp_path: Path) -> None:
    """An object store: whole files only; metrics appear with the checkpoints."""
    model = tiny_folder(tmp_path / "start")
    config = CONFIG | {"checkpoint_every": 2}
    train_job(config, model, tmp_path / "local")
    work = f"memory://train-{tmp_path.name}"
    assert train_job(config, model, work, interrupt=3) == 0
    visible = storage.read_bytes(f"{work}/metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in visible] == [0, 1]
    assert train_job(config, model, work) == 2
    for name in ("model/model.safetensors", "model/nvembed.json"):
        assert storage.read_bytes(f"{work}/{name}") == (tmp_path / "local" / name).read_bytes()
    rows = [json.loads(line) for line in storage.read_bytes(f"{work}/metrics.jsonl").splitlines()]
    expected = [json.loads(line) for line in (tmp_path / "local" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in rows] == [(r["step"], r["loss"]) for r in expected]
    starts = [json.loads(line)["step"] for line in storage.read_bytes(f"{work}/starts.jsonl").splitlines()]
    assert starts == [0, 2]


def test_a_finished_run_only_repeats_its_export(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "start")
    train_job(CONFIG, model, tmp_path / "work", steps=2)
    before = (tmp_path / "work" / "model" / "model.safetensors").read_bytes()
    (tmp_path / "work" / "model" / "model.safetensors").unlink()
    assert train_job(CONFIG, model, tmp_path / "work", steps=2) is None
    assert (tmp_path / "work" / "model" / "model.safetensors").read_bytes() == before
    link = storage.read_json(str(tmp_path / "work" / "checkpoint.json"))
    (newest,) = (tmp_path / "work" / "checkpoints").glob(f"step-{link['step']:06d}")
    expected = storage.read_json(str(newest / "manifest.json"))["files"]
    assert link["step"] == 2 and link["files"] and link["files"].items() <= expected.items()
