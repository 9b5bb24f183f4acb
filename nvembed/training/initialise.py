"""The steps `initialise` and `student_init`: the untrained teacher, and the student before training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvembed.core import storage
from nvembed.core.model_cache import local_model, written_folder
from nvembed.core.parquet import iter_parquet
from nvembed.core.steps import Step, StepResult
from nvembed.data.tables import CORPUS, dataset_info, examples_file
from nvembed.modeling.assemble import build_embedder, continue_embedder, truncate_embedder
from nvembed.modeling.backbones import load_backbone
from nvembed.modeling.config import (
    InitialiseConfig,
    NvembedBackbone,
    RandomBackbone,
    TruncateConfig,
)
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.folder import describe_folder, load_embedder, save_embedder
from nvembed.modeling.origin import started_from
from nvembed.types import Artifact, Config

logger = logging.getLogger(__name__)


def tokenizer_texts(prepare: Artifact) -> Iterator[str]:
    """Corpus texts and train queries of every data set, in file order, without those of dev and test."""
    for name in sorted(prepare.manifest["metrics"]["datasets"]):
        for title, text, split in _rows(prepare.path(name, CORPUS), ["title", "text", "split"]):
            if split in (None, "train"):
                yield f"{title} {text}".strip()
        for (query,) in _rows(prepare.path(name, examples_file("train")), ["query"]):
            yield query


def _rows(uri: str, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    for table in iter_parquet(uri, columns):
        yield from zip(*(table.column(column).to_pylist() for column in columns), strict=True)


def dataset_prompts(prepare: Artifact) -> dict[str, str]:
    """Prompts of a model folder: one per data set by name, and `query`, that of the recipe's first retrieval set."""
    datasets = dataset_info(prepare)
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
    texts = tokenizer_texts(prepare) if isinstance(config.backbone, RandomBackbone) else iter(())
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
