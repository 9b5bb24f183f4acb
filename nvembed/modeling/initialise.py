"""Steps that make a model folder without training: the untrained teacher, and the student before it learns."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from nvembed import storage
from nvembed.changes import differences
from nvembed.fetch import local_model, written_folder
from nvembed.modeling.backbones import keep_first_layers, load_backbone
from nvembed.modeling.bidirectional import attends_ahead
from nvembed.modeling.config import (
    EmbedderConfig,
    FoldedLatentAttentionConfig,
    InitialiseConfig,
    MeanConfig,
    NvembedBackbone,
    RandomBackbone,
    TruncateConfig,
)
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.folder import describe_folder, load_embedder, save_embedder
from nvembed.modeling.origin import started_from
from nvembed.storage import Step, StepResult, UserError
from nvembed.text.tokenise import Tokeniser
from nvembed.types import Artifact, Config

logger = logging.getLogger(__name__)


def build_embedder(backbone: Any, tokenizer: Any, config: EmbedderConfig, seed: int) -> Embedder:
    """An embedder with fresh pooling; the same seed gives the same weights, whatever was drawn before.

    Raises:
        UserError: the tokenizer lacks a special token, or the backbone does not obey the attention switch.
    """
    if isinstance(config.pooling, FoldedLatentAttentionConfig):
        raise UserError("embedder.pooling: folded_latent_attention is made from a trained model (nvembed export).")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedder = Embedder(backbone, Tokeniser(tokenizer, config.text), config).eval()
    try:
        ahead = attends_ahead(backbone)
    except ValueError as error:
        raise UserError(str(error)) from error
    if ahead != config.bidirectional:
        raise UserError(
            f"embedder.bidirectional is {str(config.bidirectional).lower()}, but {type(backbone).__name__} does not "
            "follow: the installed transformers has no such switch for it. Llama, Mistral, Qwen2 and Qwen3 have it."
        )
    return embedder


def continue_embedder(backbone: NvembedBackbone, config: EmbedderConfig) -> Embedder:
    """The model of a finished folder, head included, to be trained on.

    Raises:
        UserError: no model folder there, or one whose embedder is another than the recipe's.
    """
    if backbone.name.startswith("models:/"):
        raise UserError(f"initialise.backbone.name: {backbone.name!r} must be a folder; copy the model version to one.")
    stored = EmbedderConfig.model_validate(describe_folder(backbone.name)["embedder"])
    text = stored.text.model_copy(update={"max_length": config.text.max_length})
    wanted = stored.model_copy(update={"text": text})
    if changes := differences(wanted.model_dump(mode="json"), config.model_dump(mode="json")):
        listed = "\n  ".join(changes)
        raise UserError(
            f"initialise.embedder is not that of {backbone.name} (folder -> recipe):\n  {listed}\n"
            f"Write the folder's own: {json.dumps(wanted.model_dump(mode='json'))}"
        )
    embedder = load_embedder(backbone.name)
    if wanted == stored:
        return embedder
    longer = Embedder(embedder.embedding_model, Tokeniser(embedder.tokeniser.tokenizer, text), wanted).eval()
    longer.latent_attention_model = embedder.latent_attention_model
    return longer


def truncate_embedder(embedder: Embedder, num_layers: int) -> Embedder:
    """A student: the teacher's first layers and final norm, mean pooled over everything, the same tokenizer.

    The backbone's layers are shared with `embedder`, which is cut too.

    Raises:
        UserError: not fewer layers than the teacher has.
    """
    total = len(embedder.embedding_model.layers)
    if num_layers >= total:
        raise UserError(f"student.init.num_layers is {num_layers}; it must be less than the teacher's {total} layers.")
    keep_first_layers(embedder.embedding_model, num_layers)
    text = embedder.config.text.model_copy(update={"mask_instruction": False})
    config = embedder.config.model_copy(update={"pooling": MeanConfig(), "text": text})
    return Embedder(embedder.embedding_model, Tokeniser(embedder.tokeniser.tokenizer, text), config).eval()


def training_texts(prepare: Artifact) -> Iterator[str]:
    """Corpus texts and train queries of every data set, in file order; held-out items and queries are left out."""
    for name in sorted(prepare.manifest["metrics"]["datasets"]):
        for title, text, split in _rows(prepare.path(name, "corpus.parquet"), ["title", "text", "split"]):
            if split in (None, "train"):
                yield f"{title} {text}".strip()
        for (query,) in _rows(prepare.path(name, "examples-train.parquet"), ["query"]):
            yield query


def _rows(uri: str, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    with storage.open_reader(uri) as file:
        for batch in pq.ParquetFile(file).iter_batches(4096, columns=columns):
            yield from zip(*(batch.column(column).to_pylist() for column in columns), strict=True)


def dataset_prompts(prepare: Artifact) -> dict[str, str]:
    """Prompts of a model folder: one per data set by its name, and `query`, that of the first retrieval set."""
    datasets: Mapping[str, Any] = prepare.manifest["metrics"]["datasets"]
    prompts = {name: str(row["instruction"]) for name, row in datasets.items()}
    retrieval = [name for name, row in datasets.items() if row["task"] == "retrieval"]
    first = next(iter(retrieval or datasets), None)
    return prompts if first is None else {"query": prompts[first], **prompts}


def _initialise(config: Config, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    assert isinstance(config, InitialiseConfig)
    prepare = inputs["prepare"]
    if isinstance(config.backbone, NvembedBackbone):
        embedder = continue_embedder(config.backbone, config.embedder)
        made = _publish(embedder, work_uri, dataset_prompts(prepare), "Not trained here yet.")
        made.metrics["started_from"] = started_from(Path(config.backbone.name))
        return made
    texts = training_texts(prepare) if isinstance(config.backbone, RandomBackbone) else iter(())
    backbone, tokenizer = load_backbone(config.backbone, texts, config.seed)
    embedder = build_embedder(backbone, tokenizer, config.embedder, config.seed)
    return _publish(embedder, work_uri, dataset_prompts(prepare), "Untrained.")


def _truncate(config: Config, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    assert isinstance(config, TruncateConfig)
    teacher_folder = local_model(inputs["model"].path("model"))
    student = truncate_embedder(load_embedder(teacher_folder), config.num_layers)
    prompts = describe_folder(teacher_folder)["prompts"]
    return _publish(student, work_uri, prompts, "The first layers of a teacher, before training.")


def _publish(embedder: Embedder, work_uri: str, prompts: Mapping[str, str], notes: str) -> StepResult:
    with written_folder(storage.join(work_uri, "model")) as folder:
        save_embedder(embedder, folder, prompts=prompts, card=notes)
    metrics = {
        "dim": embedder.dim,
        "layers": len(embedder.embedding_model.layers),
        "parameters": sum(parameter.numel() for parameter in embedder.parameters()),
    }
    logger.info(
        "model folder: %d layers, %d parameters, %d dimensions", *(metrics[k] for k in ("layers", "parameters", "dim"))
    )
    return StepResult(metrics=metrics)


INITIALISE = Step("initialise", 1, _initialise)
STUDENT_INIT = Step("student_init", 1, _truncate)
