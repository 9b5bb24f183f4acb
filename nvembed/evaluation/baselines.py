"""The `baselines` step: scores to compare a trained model with, on the same held-out sets.

- `bm25`: no training at all.
- `minilm`: an off-the-shelf embedder (the recipe's `reference`), used in its own form.
- `untrained`: the backbone before training *at its best*: mean or last-token pooling, bidirectional or causal, with the
  same instruction as the trained model. The best variant of each data set is chosen on a small dev comparison, then
  scored once on the reported split. All dev numbers are in `scores.json` under `untrained_variants`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nvembed.core import storage
from nvembed.core.steps import Step, StepResult
from nvembed.core.vectors import read_vectors, write_text_shards
from nvembed.evaluation.config import BaselineConfig
from nvembed.evaluation.run import lay_out_texts, load_sets, notes, settings_of, stored_vectors, write_scores
from nvembed.evaluation.tasks import Caps, HeldOut, Row, Vectors
from nvembed.modeling.config import LastTokenConfig, MeanConfig
from nvembed.retrieval.config import EncodeConfig, FolderModel
from nvembed.retrieval.encode import Encoding, encode_each
from nvembed.retrieval.encoders import check_model
from nvembed.types import Artifact


def _build(config: BaselineConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    prepare, folder = inputs["prepare"], inputs["model"].path("model")
    settings = settings_of(config.evaluate)
    check_model(config.reference)
    sets = load_sets(prepare, config.evaluate.split)
    paths = {
        name: storage.join(work_uri, "checkpoints", name)
        for name in ("dev_texts", "dev_vectors", "texts", "reference", "untrained")
    }
    models, encode = variants(folder), encode_config(config)
    dev = _dev_sets(prepare, sets, config)
    write_text_shards(_labelled_rows(dev), paths["dev_texts"], encode.shard_rows)
    dev_vectors = {name: storage.join(paths["dev_vectors"], name) for name in models}
    reports = encode_each([Encoding(paths["dev_texts"], models[name], dev_vectors[name]) for name in models], encode)
    compared = {name: _dev_scores(dev, uri, config) for name, uri in dev_vectors.items()}
    chosen = {held_out.dataset: _best(compared, held_out.dataset) for held_out in sets}
    encodings = []
    for name in sorted(set(chosen.values())):  # texts lie by the variant of their data set: each is loaded once
        texts = storage.join(paths["texts"], name)
        lay_out_texts([held_out for held_out in sets if chosen[held_out.dataset] == name], texts, encode.shard_rows)
        encodings.append(Encoding(texts, models[name], storage.join(paths["untrained"], name)))
    encodings.append(Encoding(paths["texts"], config.reference, paths["reference"]))
    reports += encode_each(encodings, encode)
    systems = {"bm25": {held_out.dataset: held_out.score_bm25(settings) for held_out in sets}}
    for system, uri in (("minilm", paths["reference"]), ("untrained", paths["untrained"])):
        systems[system] = {
            name: held_out.score(stored_vectors(storage.join(uri, chosen[name]), name), settings)
            for name, held_out in ((held_out.dataset, held_out) for held_out in sets)
        }
    extra = {
        "split": config.evaluate.split,
        "untrained_variants": {
            "chosen": chosen,
            "chosen_on": {held_out.dataset: split for held_out, split in dev},
            "documents": config.dev_documents,
            "queries": config.dev_queries,
            "scores": compared,
        },
        "notes": {**notes(config.evaluate, sets), **_notes(config)},
    }
    result = write_scores(work_uri, systems, prepare, extra)
    result.metrics["encode_cpu_seconds"] = sum(report.cpu_seconds for report in reports)
    return result


BASELINES = Step("baselines", 1, _build, cleared=False)


def variants(folder: str) -> dict[str, FolderModel]:
    """The untrained backbone under each pooling and direction, by its key in `scores.json`."""
    poolings: dict[str, MeanConfig | LastTokenConfig] = {"mean": MeanConfig(), "last_token": LastTokenConfig()}
    return {
        f"{name}_{'bidirectional' if bidirectional else 'causal'}": FolderModel(
            folder=folder,
            pooling=pooling,
            bidirectional=bidirectional,
            packed=False,  # padded, as their scores always were
        )
        for bidirectional in (True, False)
        for name, pooling in poolings.items()
    }


def encode_config(config: BaselineConfig) -> EncodeConfig:
    """`evaluate.encode` for models that are encoded once: whole texts, fp32 vectors, no cache."""
    once = {"vector_type": "fp32", "cache": None, "max_query_length": None, "max_document_length": None}
    return config.evaluate.encode.model_copy(update=once)


def _dev_sets(prepare: Artifact, sets: Sequence[HeldOut], config: BaselineConfig) -> list[tuple[HeldOut, str]]:
    """A small comparison for every data set, and the split it comes from.

    A set without dev examples chooses on the reported split itself, which can only favour the baseline.
    """
    caps = Caps(config.dev_documents, config.dev_queries, config.evaluate.seed)
    dev = {held_out.dataset: held_out for held_out in load_sets(prepare, "dev", caps, required=False)}
    missing = [held_out.dataset for held_out in sets if held_out.dataset not in dev]
    own = (
        {held_out.dataset: held_out for held_out in load_sets(prepare, config.evaluate.split, caps)} if missing else {}
    )
    return [
        (dev[name], "dev") if name in dev else (own[name], config.evaluate.split)
        for name in (held_out.dataset for held_out in sets)
    ]


def _labelled_rows(dev: Sequence[tuple[HeldOut, str]]) -> Iterator[Row]:
    """Texts of all dev sets in one stream, each key with its data set and role: few, large shards."""
    for held_out, _ in dev:
        for role, rows in held_out.roles().items():
            for key, text, instruction in rows():
                yield f"{held_out.dataset}/{role}/{key}", text, instruction


def _dev_scores(
    dev: Sequence[tuple[HeldOut, str]], vectors_uri: str, config: BaselineConfig
) -> dict[str, dict[str, float]]:
    """Data set -> metric -> value of one variant."""
    keys, matrix_ND = read_vectors(vectors_uri)
    places: dict[tuple[str, str], tuple[list[str], list[int]]] = {}
    for index, label in enumerate(keys):
        dataset, role, key = label.split("/", 2)
        rows_of_role = places.setdefault((dataset, role), ([], []))
        rows_of_role[0].append(key)
        rows_of_role[1].append(index)
    settings = replace(settings_of(config.evaluate), samples=1)  # no interval is taken from the choice
    return {
        held_out.dataset: {
            row.metric: row.interval["value"]
            for row in held_out.score(_in_memory(held_out.dataset, places, matrix_ND), settings)
        }
        for held_out, _ in dev
    }


def _in_memory(
    dataset: str, places: Mapping[tuple[str, str], tuple[list[str], list[int]]], matrix_ND: np.ndarray
) -> Vectors:
    def vectors(role: str) -> Iterator[tuple[list[str], np.ndarray]]:
        keys, rows = places[dataset, role]
        yield keys, matrix_ND[rows]

    return vectors


def _best(compared: Mapping[str, Mapping[str, Mapping[str, float]]], dataset: str) -> str:
    """The variant with the highest primary metric; the first of `variants` among equals."""
    return max(compared, key=lambda name: next(iter(compared[name][dataset].values())))


def _notes(config: BaselineConfig) -> dict[str, Any]:
    form = "with the instruction" if config.reference.instruction else "without any instruction, as it was trained"
    return {
        "bm25": "Lucene variant, k1 1.5, b 0.75; accuracy: k-NN by BM25 score; spearman: mean score of both "
        "directions; no v_measure, as it has no vectors to cluster",
        "minilm": f"{config.reference.model_dump(mode='json')}, {form}; everything else as for our models",
        "untrained": "the best of mean/last token x bidirectional/causal for each data set, chosen by the primary "
        "metric on dev examples with a capped corpus, with the same instruction as our models",
    }
