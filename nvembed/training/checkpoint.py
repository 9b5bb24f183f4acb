"""World-free checkpoints: whole tensors by name, one format for every engine and number of ranks.

    checkpoints/step-000020/            20 optimiser steps were done; the next one is 20
      parameters-00000.safetensors      float32 masters of the trained parameters (frozen ones: the input model folder)
      exp_avg-00000.safetensors         AdamW's moments
      exp_avg_sq-00000.safetensors
      state.json                        step, settings, input hashes, versions, threads, processor, world size
      manifest.json                     sizes and checksums; written last: without it the directory is no checkpoint

No random state is stored: every step seeds its own from (seed, step, rank). No scheduler state: the learning rate is a
function of the step.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nvembed.core import storage
from nvembed.core.distributed import WorkerContext, broadcast_object
from nvembed.core.formats import check_format, stamp, with_defaults
from nvembed.core.runtime import installed_versions, processor_name
from nvembed.core.steps import (
    MANIFEST,
    ChangedRecipeError,
    CorruptArtifactError,
    describe_files,
    differences,
    verify_files,
)
from nvembed.modeling.precision import Precision
from nvembed.training.config import TrainConfig
from nvembed.training.engine import Engine
from nvembed.types import UserError

logger = logging.getLogger(__name__)

STATE = "state.json"
FORMAT_VERSION = 1
FILE_BYTES = 2 << 30  # rank 0 holds at most this much of the gathered state at a time
_NAME = re.compile(r"step-(\d{6,})")
_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "numpy", "tokenizers")
# Settings that a resumed run may change: machines and files, not the numbers.
_FREE = ("num_workers", "gpus_per_worker", "checkpoint_every", "keep_checkpoints", "max_failures")
_ROUNDING = ("engine", "token_budget")  # free too, but they change the order of sums


@dataclass(frozen=True)
class Identity:
    """The settings and inputs that a checkpoint belongs to.

    Attributes:
        config: the training section.
        inputs: content hash of every input artifact.
        precision: resolved, "fp32" or "bf16".
        world_size: ranks of this run.
    """

    config: TrainConfig
    inputs: Mapping[str, str]
    precision: Precision
    world_size: int

    def state(self, step: int) -> dict[str, Any]:
        """The content of `state.json`."""
        return {
            **stamp(FORMAT_VERSION),
            "step": step,
            "config": self.config.model_dump(mode="json"),
            "inputs": dict(self.inputs),
            "precision": self.precision,
            "world_size": self.world_size,
            "threads": self.config.threads_per_worker,
            "processor": processor(),
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Versions of the packages that compute; the torch engine runs where DeepSpeed is not installed."""
    return {"python": platform.python_version(), **installed_versions(_PACKAGES)}


def processor() -> str:
    """The processor (and GPU) type numbers were computed on."""
    name = processor_name()
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


class Checkpoint:
    """A complete checkpoint, verified; its tensors are read one at a time.

    Args:
        uri: its directory. A remote one is copied to a temporary folder at the first read.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.state: dict[str, Any] = storage.read_json(storage.join(uri, STATE))
        self.step = int(self.state["step"])
        self._files = [name for name in storage.list_directory(uri) if name.endswith(".safetensors")]
        self._index: dict[tuple[str, str], Path] = {}
        self._copy: tempfile.TemporaryDirectory[str] | None = None

    def _open(self) -> None:
        if self._index:
            return
        folder = self._local_folder()
        for file in self._files:
            with safe_open(folder / file, framework="pt") as tensors:
                self._index |= {(file.rsplit("-", 1)[0], name): folder / file for name in tensors.keys()}  # noqa: SIM118

    def _local_folder(self) -> Path:
        if storage.is_local(self.uri):
            return storage.local_path(self.uri)
        self._copy = tempfile.TemporaryDirectory(prefix="nvembed-checkpoint-")
        fs, path = storage.filesystem(self.uri)
        for file in self._files:
            fs.get_file(f"{path}/{file}", f"{self._copy.name}/{file}")
        return Path(self._copy.name)

    def read(self, kind: str, name: str) -> torch.Tensor:
        """One whole tensor of `parameters`, `exp_avg` or `exp_avg_sq`, on the CPU."""
        self._open()
        if (kind, name) not in self._index:
            raise CorruptArtifactError(f"{self.uri} has no {kind} of {name}: it was made for another model.")
        with safe_open(self._index[kind, name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def load_parameters(self, model: torch.nn.Module) -> None:
        """Put the masters into the trained parameters of a model that no engine has taken yet."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(self.read("parameters", name))


class CheckpointStore:
    """The checkpoints of one run under `<work>/checkpoints`.

    Args:
        work_uri: the step's directory.
        identity: of this run; checkpoints of another are refused.
    """

    def __init__(self, work_uri: str, identity: Identity) -> None:
        self.uri = storage.join(work_uri, "checkpoints")
        self.identity = identity

    def newest(self, context: WorkerContext) -> Checkpoint | None:
        """The newest complete checkpoint, the same on every rank; None where there is none.

        A damaged one is passed over with a warning that names the file. Rank 0 decides.

        Raises:
            ChangedRecipeError: its settings or inputs are others.
            UserError: it was made with another number of threads per worker.
        """
        verdict: dict[str, str | None] = {}
        if context.rank == 0:
            try:
                verdict = {"uri": self._choose(here=True)}
            except UserError as problem:  # every rank has to stop, with the same words
                verdict = {"error": str(problem), "changed": "yes" if isinstance(problem, ChangedRecipeError) else None}
        verdict = broadcast_object(verdict)
        if message := verdict.get("error"):
            raise (ChangedRecipeError if verdict["changed"] else UserError)(message)
        uri = verdict["uri"]
        return None if uri is None else Checkpoint(uri)

    def preview(self) -> int:
        """The step a run will start at, for the launcher: refusals and warnings of `newest` before workers start.

        Only what depends on the workers' machines (precision, processor) is left to them.
        """
        uri = self._choose(here=False)
        return Checkpoint(uri).step if uri else 0

    def _choose(self, *, here: bool) -> str | None:
        for _, name in sorted(self._names(), reverse=True):
            uri = storage.join(self.uri, name)
            try:
                _verify(uri)
            except CorruptArtifactError as problem:
                logger.warning("checkpoint passed over: %s", problem)
                continue
            state = with_defaults(storage.read_json(storage.join(uri, STATE)), TrainConfig)
            self._check(state, uri, here=here)
            return uri
        return None

    def _names(self) -> list[tuple[int, str]]:
        names = storage.list_directory(self.uri)
        return [(int(match[1]), name) for name in names if (match := _NAME.fullmatch(name))]

    def _check(self, state: Mapping[str, Any], uri: str, *, here: bool) -> None:
        ours = self.identity.state(int(state["step"]))
        if not here:
            ours |= {key: state[key] for key in ("precision", "processor")}
        changes = differences(_decisive(state), _decisive(ours))
        if changes:
            raise ChangedRecipeError(
                f"{uri} was made with other settings:\n  " + "\n  ".join(changes) + "\n"
                "Restore them, use another --out, or move the directory away."
            )
        if state["threads"] != ours["threads"]:
            raise UserError(
                f"{uri} was made with {state['threads']} threads per worker, now there are {ours['threads']}: sums "
                "would be rounded differently and the resumed run would not be bit-equal. Set "
                f"threads_per_worker to {state['threads']}, or start over in another --out."
            )
        for line in differences(_circumstances(state), _circumstances(ours)):
            logger.warning("resuming from %s with %s: bit-equality is not promised", uri, line)

    def save(self, engine: Engine, step: int, context: WorkerContext) -> None:
        """Write the checkpoint after `step` optimiser steps and drop the oldest; all ranks take part."""
        uri = storage.join(self.uri, f"step-{step:06d}")
        if context.rank == 0:
            storage.remove(uri)  # a torn one of a killed run
            storage.make_directory(uri)
        for kind in ("parameters", *engine.moments):
            _write_tensors(engine.tensors(kind), uri, kind, write=context.rank == 0)
        if context.rank == 0:
            storage.write_json(storage.join(uri, STATE), self.identity.state(step))
            _publish(uri)
            self._prune()
        context.report({"step": step, "checkpoint": uri})

    def _prune(self) -> None:
        complete = [name for _, name in sorted(self._names()) if storage.exists(storage.join(self.uri, name, MANIFEST))]
        for name in complete[: -self.identity.config.keep_checkpoints]:
            storage.remove(storage.join(self.uri, name, MANIFEST))  # first: a half-deleted one is not a checkpoint
            storage.remove(storage.join(self.uri, name))


def _decisive(state: Mapping[str, Any]) -> dict[str, Any]:
    free = {*_FREE, *_ROUNDING, "threads_per_worker", "precision"}  # the resolved precision counts
    config = {key: value for key, value in state["config"].items() if key not in free}
    return {"config": config, "inputs": state["inputs"], "precision": state["precision"]}


def _circumstances(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: state[key] for key in ("versions", "processor", "world_size")} | {
        key: state["config"][key] for key in _ROUNDING
    }


def _write_tensors(tensors: Iterator[tuple[str, torch.Tensor]], uri: str, kind: str, *, write: bool) -> None:
    """Drain a collective iterator on every rank; rank 0 writes files of at most about `FILE_BYTES`."""
    batch: dict[str, torch.Tensor] = {}
    number = 0
    for name, tensor in tensors:
        if not write:
            continue
        if batch and sum(t.nbytes for t in batch.values()) + tensor.nbytes > FILE_BYTES:
            _write_file(batch, storage.join(uri, f"{kind}-{number:05d}.safetensors"))
            batch, number = {}, number + 1
        batch[name] = tensor.contiguous()
    if write:
        _write_file(batch, storage.join(uri, f"{kind}-{number:05d}.safetensors"))


def _write_file(tensors: dict[str, torch.Tensor], uri: str) -> None:
    if storage.is_local(uri):
        path = storage.local_path(uri)
        save_file(tensors, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return
    folder = tempfile.mkdtemp(prefix="nvembed-checkpoint-")
    try:
        save_file(tensors, Path(folder, "tensors"))
        fs, path_there = storage.filesystem(uri)
        fs.put_file(str(Path(folder, "tensors")), path_there)
    finally:
        shutil.rmtree(folder)


def _publish(uri: str) -> None:
    """Write the manifest: from here on the checkpoint exists."""
    storage.write_json(storage.join(uri, MANIFEST), {**stamp(FORMAT_VERSION), "files": describe_files(uri)})


def _verify(uri: str) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        CorruptArtifactError: no manifest, or a file that does not match it.
        UserError: a format this nvembed does not read: passing it over would lose the run's newest steps.
    """
    manifest_uri = storage.join(uri, MANIFEST)
    if not storage.exists(manifest_uri):
        raise CorruptArtifactError(f"{uri} has no {MANIFEST} (the run was stopped while it saved)")
    try:
        manifest = storage.read_json(manifest_uri)
        files = manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifactError(f"{manifest_uri} cannot be read ({error})") from error
    check_format(manifest, manifest_uri, newest=FORMAT_VERSION)
    verify_files(uri, files)
