"""The `evaluate` step: one model on every held-out set of a `prepare` artifact.

All texts of all sets are encoded in one actor pool; the scores of every Matryoshka prefix come from the same vectors.
Writes `scores.json` (values with intervals) and `items.parquet` (per-item values, for paired comparisons). A killed run
reuses the vector shards under `checkpoints/` that still match.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from nvembed.core import storage
from nvembed.core.model_cache import local_model
from nvembed.core.parquet import write_table
from nvembed.core.steps import ITEMS, SCORES, Step, StepResult
from nvembed.core.vectors import iter_vectors, write_text_shards
from nvembed.data.tables import dataset_info
from nvembed.evaluation.config import EvaluateConfig
from nvembed.evaluation.tasks import (
    Caps,
    HeldOut,
    LabelledSet,
    Scored,
    Settings,
    Vectors,
    load_held_out,
    prefix_vectors,
)
from nvembed.modeling.folder import describe_folder
from nvembed.retrieval.encode import encode_shards
from nvembed.types import Artifact, UserError

logger = logging.getLogger(__name__)

ITEMS_SCHEMA = pa.schema(
    [
        ("system", pa.string()),
        ("dataset", pa.string()),
        ("metric", pa.string()),
        ("item_id", pa.string()),
        ("value", pa.float64()),
        ("gold", pa.float64()),
    ]
)
Systems = Mapping[str, Mapping[str, Sequence[Scored]]]  # system -> data set -> metrics, primary first


def settings_of(config: EvaluateConfig) -> Settings:
    """The part of the configuration that turns vectors into scores."""
    return Settings(config.bootstrap_samples, config.seed, config.neighbours, config.clusterings)


def load_sets(prepare: Artifact, split: str, caps: Caps | None = None, *, required: bool = True) -> list[HeldOut]:
    """The held-out examples of every data set that has some, in the recipe's order.

    Raises:
        UserError: none has, although `required`.
    """
    sets = []
    for dataset, info in dataset_info(prepare).items():
        held_out = load_held_out(prepare, dataset, info, split, caps)
        if held_out is None:
            logger.warning("%s has no %s examples and is not scored", dataset, split)
        else:
            sets.append(held_out)
    if required and not sets:
        raise UserError(f"no data set of {prepare.uri} has {split} examples; nothing can be scored.")
    return sets


def lay_out_texts(sets: Sequence[HeldOut], uri: str, shard_rows: int) -> int:
    """Write the text shards of all sets to `<uri>/<data set>/<role>/`; returns the number of texts."""
    return sum(
        write_text_shards(rows(), storage.join(uri, held_out.dataset, role), shard_rows)
        for held_out in sets
        for role, rows in held_out.roles().items()
    )


def stored_vectors(uri: str, dataset: str, dim: int | None = None) -> Vectors:
    """Vectors below `<uri>/<data set>/<role>/`, cut to a prefix."""
    return lambda role: prefix_vectors(iter_vectors(storage.join(uri, dataset, role)), dim)


def write_scores(work_uri: str, systems: Systems, prepare: Artifact, extra: Mapping[str, Any]) -> StepResult:
    """Write `scores.json` and `items.parquet`."""
    info = dataset_info(prepare)
    scored = {dataset for of_system in systems.values() for dataset in of_system}
    scores = {
        system: {dataset: {row.metric: row.interval for row in rows} for dataset, rows in of_system.items()}
        for system, of_system in systems.items()
    }
    content = {
        "evaluation_hash": {dataset: info[dataset]["evaluation_hash"] for dataset in info if dataset in scored},
        "scores": scores,
        **extra,
    }
    # Not storage.write_json, which sorts keys: the first metric is the primary one.
    storage.write_bytes(
        storage.join(work_uri, SCORES), (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    )
    rows = list(_item_rows(systems))
    columns = dict(zip(ITEMS_SCHEMA.names, zip(*rows, strict=True), strict=True)) if rows else {}
    table = pa.table({name: list(values) for name, values in columns.items()}, schema=ITEMS_SCHEMA)
    write_table(table, storage.join(work_uri, ITEMS))
    for system, of_system in scores.items():
        listed = (
            f"{dataset} {next(iter(rows))} {next(iter(rows.values()))['value']:.3f}"
            for dataset, rows in of_system.items()
        )
        logger.info("%s: %s", system, ", ".join(listed))
    values = {
        system: {dataset: {metric: row["value"] for metric, row in rows.items()} for dataset, rows in of_system.items()}
        for system, of_system in scores.items()
    }
    return StepResult(rows={"items": table.num_rows}, metrics={"scores": values})


def _item_rows(systems: Systems) -> Iterator[tuple[Any, ...]]:
    for system, datasets in systems.items():
        for dataset, metrics in datasets.items():
            for scored in metrics:
                gold = scored.gold if scored.gold is not None else [None] * len(scored.values)
                for item_id, value, truth in zip(scored.item_ids, scored.values, gold, strict=True):
                    yield system, dataset, scored.metric, item_id, value, truth


def notes(config: EvaluateConfig, sets: Sequence[HeldOut]) -> dict[str, str]:
    """Description of each number in words; part of `scores.json`."""
    descriptions = {
        "split": f"held-out examples of the {config.split} split; tune on dev, report on test",
        "interval": f"95 % percentile bootstrap over items, {config.bootstrap_samples} draws, seed {config.seed}",
        "retrieval": "exact search in the whole corpus; queries carry the data set's instruction, documents are bare; "
        "nDCG with linear gains as in trec_eval",
        "sts": "cosine of both texts, both with the instruction, against the gold score",
    }
    for held_out in sets:
        if isinstance(held_out, LabelledSet):
            reference, test = held_out.halves()
            descriptions[held_out.dataset] = (
                f"accuracy: {len(test)} texts labelled by their {config.neighbours} nearest (cosine) of "
                f"{len(reference)} reference texts, both held out and halved by hash class by class, with the "
                f"instruction; v_measure: k-means over all {len(reference) + len(test)}, as many clusters as classes, "
                f"mean of {config.clusterings} seeds, its interval centred on the value"
            )
    return descriptions


def _build(config: EvaluateConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    prepare, model = inputs["prepare"], inputs["model"].path("model")
    _check_dims(config.dims, model)
    sets = load_sets(prepare, config.split)
    texts, vectors = (storage.join(work_uri, "checkpoints", name) for name in ("texts", "vectors"))
    count = lay_out_texts(sets, texts, config.encode.shard_rows)
    logger.info("evaluate: %d texts of %d data sets", count, len(sets))
    # a document without a vector ranks nowhere; queries and compared texts must all have one
    report = encode_shards(texts, model, vectors, config.encode, may_reject=("documents",))
    systems: dict[str, dict[str, list[Scored]]] = {}
    for dim in (None, *config.dims):
        system = "model" if dim is None else f"model@{dim}"
        systems[system] = {
            held_out.dataset: held_out.score(stored_vectors(vectors, held_out.dataset, dim), settings_of(config))
            for held_out in sets
        }
    result = write_scores(work_uri, systems, prepare, {"split": config.split, "notes": notes(config, sets)})
    # The share of each process differs from run to run: in the manifest's metrics, not in a file of the artifact.
    result.metrics["encode"] = {**report.counts(), "workers": len(report.workers)}
    return result


EVALUATE = Step("evaluate", 1, _build, cleared=False)


def _check_dims(dims: Sequence[int], folder: str) -> None:
    """Refuse impossible prefixes before anything is encoded."""
    width = int(describe_folder(local_model(folder))["dim"])
    wrong = [str(dim) for dim in dims if not 1 <= dim < width]
    if wrong:
        raise UserError(
            f"evaluate.dims: {', '.join(wrong)} cannot be a prefix of this model's {width} numbers; "
            f"choose 1 to {width - 1}."
        )
