"""The model card: README.md of a model folder, in the format of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from nvembed.modeling.config import EmbedderConfig
from nvembed.modeling.origin import HUB_LICENCES
from nvembed.modeling.sentence_folder import CODE, needs_code

METRIC_NAMES = {
    "ndcg_at_10": "nDCG@10",
    "recall_at_100": "recall@100",
    "mrr_at_10": "MRR@10",
    "accuracy": "accuracy",
    "v_measure": "V-measure",
    "spearman": "Spearman correlation",
}
TASK_NAMES = {
    "retrieval": "Retrieval",
    "classification": "Classification",
    "clustering": "Clustering",
    "sts": "STS",
}


@dataclass(frozen=True)
class CardFacts:
    """Evaluation, licences and origin of a model, for its card.

    Attributes:
        name: name and version in the registry.
        scores: data set -> metric -> value, low, high (0-1, 95 % interval); the primary metric first.
        tasks: data set -> task.
        split: the split that was scored.
        licences: rows of `kind` (data set, backbone, mining model), `name`, `licence`.
        chain: (step, manifest hash) from the data to the folder.
    """

    name: str
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    tasks: Mapping[str, str]
    split: str
    licences: Sequence[Mapping[str, str]]
    chain: Sequence[tuple[str, str]] = field(default_factory=tuple)


def model_card(
    config: EmbedderConfig,
    dim: int,
    parameters: int,
    prompts: Mapping[str, str],
    notes: str | None = None,
    facts: CardFacts | None = None,
    licences: Sequence[Mapping[str, str]] = (),
) -> str:
    """README.md of a model folder.

    Args:
        parameters: number of parameters.
        notes: more text, as Markdown.
        facts: evaluation, licences and origin; known from the registration on.
        licences: rows as in `CardFacts`, used where `facts` is None.
    """
    code = ", trust_remote_code=True" if needs_code(config) else ""
    name = next((name for name, prompt in prompts.items() if prompt), None)
    call = f'model.encode(queries, prompt_name="{name}")' if name else "model.encode(queries)"
    direction = "bidirectional" if config.bidirectional else "causal"
    given = licences if facts is None else facts.licences
    front = yaml.safe_dump(_front_matter(facts, given), sort_keys=False, allow_unicode=True, width=120)
    lines = [
        f"---\n{front}---",
        "",
        f"# {facts.name}" if facts else "# Text embedding model",
        "",
        f"{parameters:,} parameters, {dim}-dimensional vectors of length 1, at most {config.text.max_length} tokens, "
        f"{config.pooling.type.replace('_', ' ')} pooling, {direction} attention. Made by nvembed.",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("this folder"{code})',
        f"query_vectors = {call}",
        "document_vectors = model.encode(documents)",
        "```",
        "",
    ]
    if code:
        lines += [f"The code it trusts is in this folder: {', '.join(f'`{name}`' for name in CODE)}.", ""]
    if prompts:
        lines += ["Prompts, for queries:", "", "| name | prompt |", "|---|---|"]
        lines += [f"| {name} | `{json.dumps(prompt, ensure_ascii=False)}` |" for name, prompt in prompts.items()]
        lines += [""]
    if facts:
        lines += _sections(facts)
    return "\n".join(lines) + (f"\n{notes.strip()}\n" if notes else "")


def _front_matter(facts: CardFacts | None, licences: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "nvembed"],
    }
    if licences or facts is not None:
        front |= _licence(licences)
        front["nvembed"] = {"licences": [dict(row) for row in licences]}  # read when another model starts from this
    if facts is not None:
        front["datasets"] = [row["name"] for row in licences if row["kind"] == "data set"]
        results = [_result(facts, dataset) for dataset in facts.scores]
        front["model-index"] = [{"name": facts.name, "results": results}]
    return front


def _licence(licences: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The backbone's licence, under an id that hubs know."""
    backbones = [row for row in licences if row["kind"] == "backbone"]
    ids = {row["licence"].lower() for row in backbones}
    if len(ids) == 1 and ids <= HUB_LICENCES:
        front: dict[str, Any] = {"license": ids.pop()}
    else:
        front = {"license": "other", "license_name": "see-the-card"}
    return {**front, "base_model": [row["name"] for row in backbones]} if backbones else front


def _result(facts: CardFacts, dataset: str) -> dict[str, Any]:
    task = facts.tasks.get(dataset, "retrieval")
    metrics = [
        {
            "type": metric,
            "name": METRIC_NAMES.get(metric, metric),
            "value": round(row["value"], 6),
            "args": {"low": round(row["low"], 6), "high": round(row["high"], 6), "interval": "95 % bootstrap"},
        }
        for metric, row in facts.scores[dataset].items()
    ]
    return {
        "task": {"type": task, "name": TASK_NAMES.get(task, task)},
        "dataset": {"type": dataset, "name": dataset, "split": facts.split},
        "metrics": metrics,
    }


def _sections(facts: CardFacts) -> list[str]:
    lines = [
        "## Evaluation",
        "",
        f"Held-out examples, {facts.split} split; 95 % intervals by the bootstrap.",
        "",
        "| data set | metric | value | low | high |",
        "|---|---|---|---|---|",
    ]
    for dataset, metrics in facts.scores.items():
        for metric, row in metrics.items():
            values = " | ".join(f"{row[key]:.4f}" for key in ("value", "low", "high"))
            lines.append(f"| {dataset} | {METRIC_NAMES.get(metric, metric)} | {values} |")
    lines += ["", "## Licences of what it was made from", "", "| | name | licence |", "|---|---|---|"]
    lines += [f"| {row['kind']} | {row['name']} | {row['licence']} |" for row in facts.licences]
    lines += [
        "",
        "The licence above is the backbone's. What the licences of the data ask for, above all attribution, holds too.",
        "",
    ]
    if facts.chain:
        lines += ["## Where it comes from", "", "| step | hash of its manifest |", "|---|---|"]
        lines += [f"| {step} | `{digest}` |" for step, digest in facts.chain]
        lines += [""]
    return lines
