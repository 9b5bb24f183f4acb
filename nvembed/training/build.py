"""The model of a training run: built from a model folder, saved to one at the end."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from safetensors.torch import save

from nvembed.core import storage
from nvembed.core.model_cache import local_model, written_folder
from nvembed.core.steps import MANIFEST, OBJECTIVE
from nvembed.losses.objectives import build_objective
from nvembed.modeling.adapters import apply_adapter, keep_adapter, merge_adapter
from nvembed.modeling.folder import describe_folder, load_embedder, save_embedder
from nvembed.modeling.precision import Precision
from nvembed.text.instructions import CATALOGUE, instruction_prefix
from nvembed.training.checkpoint import STATE, Checkpoint
from nvembed.training.config import TrainConfig
from nvembed.training.model import TrainedModel

logger = logging.getLogger(__name__)

MODEL = "model"
CHECKPOINT = "checkpoint.json"


@dataclass(frozen=True)
class TrainingSpec:
    """A training run: its settings, its inputs and its output by URI.

    Attributes:
        config: the training section.
        stream_uri: artifact of a stream step.
        model_uri: the model folder training starts from.
        work_uri: the step's directory.
        inputs: content hash of every input artifact.
        lease_uri: output whose lease this run has; None: no lease.
        fence: its fencing number.
    """

    config: TrainConfig
    stream_uri: str
    model_uri: str
    work_uri: str
    inputs: dict[str, str]
    lease_uri: str | None = None
    fence: int = 0


def build_model(spec: TrainingSpec, teacher_dim: int | None, precision: Precision) -> TrainedModel:
    """The root module, the same on every rank: loaded, adapter applied, objective fresh, in training mode."""
    config = spec.config
    torch.manual_seed(config.seed)
    embedder = load_embedder(local_model(spec.model_uri))
    apply_adapter(embedder, config.adapter)
    if config.engine.gradient_checkpointing:
        embedder.embedding_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = build_objective(config.objective, dim=embedder.dim, teacher_dim=teacher_dim)
    return TrainedModel(embedder, objective, precision).train()


def save_trained_model(spec: TrainingSpec, checkpoint: Checkpoint, teacher_dim: int | None) -> None:
    """Write the trained model folder and the files that describe its origin.

    `model/` (float32, LoRA merged, the adapter beside it), `checkpoint.json` (the checksums it comes from) and, where
    the objective has parameters, `objective.safetensors`.

    The inputs are the model folder the run started from and the last checkpoint: a run killed here repeats only this.
    """
    model = build_model(spec, teacher_dim, "fp32")
    checkpoint.load_parameters(model)
    model.eval()
    if spec.config.engine.gradient_checkpointing:
        model.embedder.embedding_model.gradient_checkpointing_disable()
    objective = {name: tensor.contiguous() for name, tensor in model.objective.state_dict().items()}
    if objective:
        storage.write_bytes(storage.join(spec.work_uri, OBJECTIVE), save(objective))
    start = local_model(spec.model_uri)
    adapter = keep_adapter(model.embedder, start, "/".join(spec.model_uri.rstrip("/").split("/")[-2:]))
    prompts = describe_folder(start)["prompts"] or {key: instruction_prefix(key) for key in CATALOGUE}
    merge_adapter(model.embedder)
    target = storage.join(spec.work_uri, MODEL)
    recipe = spec.config.model_dump(mode="json")
    with written_folder(target) as folder:
        save_embedder(model.embedder, folder, recipe=recipe, prompts=prompts, adapter=adapter)
    # the checkpoint is deleted when the step is published; this record is its link in the hash chain
    files = storage.read_json(storage.join(checkpoint.uri, MANIFEST))["files"]
    link = {"step": checkpoint.step, "files": {name: row for name, row in files.items() if name != STATE}}
    storage.write_json(storage.join(spec.work_uri, CHECKPOINT), link)
    logger.info("model folder written: %s", target)
