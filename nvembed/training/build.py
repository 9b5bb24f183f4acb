"""From a model folder to a model that can be trained, and from a finished run to a model folder."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from nvembed import storage
from nvembed.losses.objectives import build_objective
from nvembed.modeling.adapters import apply_adapter, keep_adapter, merge_adapter
from nvembed.modeling.folder import describe_folder, load_embedder, save_embedder
from nvembed.modeling.precision import Precision
from nvembed.text.instructions import CATALOGUE, instruction_prefix
from nvembed.training.checkpoint import Checkpoint
from nvembed.training.config import TrainConfig
from nvembed.training.model import TrainedModel

logger = logging.getLogger(__name__)

MODEL = "model"
OBJECTIVE = "objective.safetensors"


@dataclass(frozen=True)
class Job:
    """One training stage, by URI.

    Attributes:
        config: the training section.
        stream_uri: artifact of a stream step.
        model_uri: the model folder training starts from.
        work_uri: the step's directory.
        inputs: content hash of every input artifact.
        lease_uri: output whose lease this run holds; None: none.
        fence: its fencing number.
    """

    config: TrainConfig
    stream_uri: str
    model_uri: str
    work_uri: str
    inputs: dict[str, str]
    lease_uri: str | None = None
    fence: int = 0


def build_model(job: Job, teacher_dim: int | None, precision: Precision) -> TrainedModel:
    """The root module, the same on every rank: loaded, adapter applied, objective fresh, in training mode."""
    config = job.config
    torch.manual_seed(config.seed)
    with local_folder(job.model_uri) as folder:
        embedder = load_embedder(folder)
    apply_adapter(embedder, config.adapter)
    if config.engine.gradient_checkpointing:
        embedder.embedding_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = build_objective(config.objective, dim=embedder.dim, teacher_dim=teacher_dim)
    return TrainedModel(embedder, objective, precision).train()


def export(job: Job, checkpoint: Checkpoint, teacher_dim: int | None) -> None:
    """Write `model/` (float32, LoRA merged and kept beside) and, if it has parameters, `objective.safetensors`.

    Everything comes from the input model folder and the last checkpoint, so that a run killed here only repeats this.
    """
    model = build_model(job, teacher_dim, "fp32")
    checkpoint.load_parameters(model)
    model.eval()
    if job.config.engine.gradient_checkpointing:
        model.embedder.embedding_model.gradient_checkpointing_disable()
    objective = {name: tensor.contiguous() for name, tensor in model.objective.state_dict().items()}
    if objective:
        storage.write_bytes(storage.join(job.work_uri, OBJECTIVE), save(objective))
    with local_folder(job.model_uri) as folder:
        adapter = keep_adapter(model.embedder, folder, "/".join(job.model_uri.rstrip("/").split("/")[-2:]))
        prompts = describe_folder(folder)["prompts"] or {key: instruction_prefix(key) for key in CATALOGUE}
    merge_adapter(model.embedder)
    target = storage.join(job.work_uri, MODEL)
    with tempfile.TemporaryDirectory(prefix="nvembed-model-") as temporary:
        local = storage.local_path(target) if storage.is_local(target) else Path(temporary, MODEL)
        recipe = job.config.model_dump(mode="json")
        save_embedder(model.embedder, local, recipe=recipe, prompts=prompts, adapter=adapter)
        if not storage.is_local(target):
            storage.remove(target)  # what a killed run left
            fs, path = storage.filesystem(target)
            fs.put(str(local), path, recursive=True)
    logger.info("model folder written: %s", target)


@contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """A model folder on this machine's file system; a remote one is copied for the time of the block."""
    if storage.is_local(uri):
        yield storage.local_path(uri)
        return
    with tempfile.TemporaryDirectory(prefix="nvembed-model-") as folder:
        fs, path = storage.filesystem(uri)
        fs.get(path, str(Path(folder, MODEL)), recursive=True)
        yield Path(folder, MODEL)
