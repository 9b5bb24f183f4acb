"""The artifacts of a complete run, written by hand in the formats of the steps."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifacts import publish
from safetensors.numpy import save

from nvembed.core import storage
from nvembed.types import Artifact, Config

RETRIEVAL_SETS = ("cwe", "hpo", "code")
PRIMARY = {**dict.fromkeys(RETRIEVAL_SETS, "ndcg_at_10"), "hpo_classes": "accuracy", "hpo_similarity": "spearman"}
OTHERS = {"ndcg_at_10": ("recall_at_100", "mrr_at_10"), "accuracy": ("v_measure",), "spearman": ()}
# how far a system's item values lie from random: the made-up truth of the example
SKILL = {
    "bm25": 0.35,
    "minilm": 0.55,
    "untrained": 0.12,
    "teacher": 0.50,
    "teacher@288": 0.47,
    "student_before": 0.20,
    "student_before@288": 0.18,
    "student": 0.42,
    "student@288": 0.39,
}


BASELINE_NOTES = {
    "notes": {"retrieval": "exact search in the whole corpus; documents are bare"},
    "untrained_variants": {"chosen": {"cwe": "mean_bidirectional", "hpo": "last_causal"}, "scores": {}},
}


class StepConfig(Config):
    """The config of any step."""

    num_workers: int = 2
    threads_per_worker: int = 1
    precision: str = "auto"


class StreamStep(Config):
    """A stream's config."""

    weights: dict[str, float]


@dataclass
class HandMadeRun:
    """A hand-made output."""

    out: str
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    def step(
        self,
        name: str,
        files: dict[str, Any],
        metrics: dict[str, Any] | None = None,
        config: Config = StepConfig(),  # noqa: B008
        **inputs: str,
    ) -> None:
        """Publish a step; bytes, pyarrow tables and JSON values become files."""

        def build(uri: str) -> dict[str, Any]:
            for path, content in files.items():
                target = storage.join(uri, path)
                if isinstance(content, bytes):
                    storage.write_bytes(target, content)
                elif isinstance(content, pa.Table):
                    storage.make_directory(uri)
                    pq.write_table(content, target)
                else:
                    storage.write_json(target, content)
            return metrics or {}

        given = {role: self.artifacts[source] for role, source in inputs.items()}
        self.artifacts[name] = publish(storage.join(self.out, name), name, build, config, **given)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records that the pipeline passes to the report."""
        return [
            {"name": name, "status": "done", "seconds": 3.5 * i, "peak_pss_mb": 700.0 + 90 * i, "artifact": a.uri}
            for i, (name, a) in enumerate(self.artifacts.items())
        ]


def evaluation_hash(dataset: str, other: str | None) -> str:
    """As `prepare` and the evaluations state it; `other` is the data set with other examples than usual."""
    return storage.hash_json([dataset] if dataset == other else dataset)


def scored(
    systems: dict[str, str],
    datasets: dict[str, str],
    extra: dict[str, Any] | None = None,
    *,
    skills: dict[str, float] = SKILL,
    other: str | None = None,
) -> dict[str, Any]:
    """`scores.json` and `items.parquet` of systems {name in the files: name in SKILL}."""
    table: dict[str, Any] = {}
    items = 120
    rows: list[dict[str, Any]] = []
    for system, known in systems.items():
        for number, (dataset, metric) in enumerate(datasets.items()):
            if known == "bm25" and metric != "ndcg_at_10":
                continue
            draw = np.random.default_rng([number, 5])
            hard, gold = draw.random(items), draw.random(items)
            noise = np.random.default_rng([number, sorted(SKILL).index(known)]).random(items)
            skill = skills[known]
            if metric == "spearman":
                values = skill * gold + (1 - skill) * noise
                point = float(np.corrcoef(values, gold)[0, 1])
            else:
                values = np.clip(skill + 0.4 * (hard - 0.5) + 0.2 * (noise - 0.5), 0, 1)
                point = float(values.mean())
            names = [*OTHERS[metric], metric]  # sorted keys put the primary metric anywhere
            table.setdefault(system, {})[dataset] = {
                name: {"value": point, "low": point - 0.03, "high": point + 0.03} for name in names
            }
            rows += [
                {
                    "system": system,
                    "dataset": dataset,
                    "metric": metric,
                    "item_id": f"i{i}",
                    "value": float(values[i]),
                    "gold": float(gold[i]) if metric == "spearman" else None,
                }
                for i in range(items)
            ]
    schema = pa.schema(
        [
            ("system", pa.string()),
            ("dataset", pa.string()),
            ("metric", pa.string()),
            ("item_id", pa.string()),
            ("value", pa.float64()),
            ("gold", pa.float64()),
        ]
    )
    hashes = {dataset: evaluation_hash(dataset, other) for dataset in datasets}
    return {
        "scores.json": {"evaluation_hash": hashes, "scores": table, **(extra or {})},
        "items.parquet": pa.Table.from_pylist(rows, schema),
    }


def model(parameters: int) -> dict[str, Any]:
    """The files of a model folder that the report looks at."""
    weights = {"embed": np.full(parameters, 0.5, np.float32)}
    pooling = {"latents": np.zeros(7, np.float32)}
    return {
        "model/model.safetensors": save(weights),
        "model/1_Pooling/model.safetensors": save(pooling),
        "model/config.json": {"hidden_size": 576},
    }


def curve(steps: int, start: float, *, gap: bool = True) -> bytes:
    """A falling, noisy loss, and a growing gap."""
    noise = np.random.default_rng(steps).normal(0, 0.15, steps)
    rows = [
        {
            "step": i,
            "loss": max(0.05, start * float(np.exp(-2.5 * i / steps)) + float(noise[i])),
            "lr": 1e-3,
            "grad_norm": 1.0,
            **({"positive_similarity": 0.4 + i / steps / 2, "hardest_similarity": 0.5} if gap else {}),
            "sample_ids_sha256": "ab",
            "tokens": 900,
            "seconds": 0.4,
        }
        for i in range(steps)
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def starts(*steps: int) -> bytes:
    """`starts.jsonl` of a run that was resumed at these steps."""
    rows = ({"step": step, "time": 1.7e9 + step, "world_size": 2, "precision": "fp32"} for step in steps)
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def mixed(rows: dict[str, int], asked: dict[str, float]) -> dict[str, Any]:
    """The data sets in the manifest of a stream."""
    total = sum(rows.values())
    datasets = {
        name: {"usable": 400, "rows": n, "epochs": n / 400, "asked": asked[name], "realised": n / total}
        for name, n in rows.items()
    }
    return {"datasets": datasets}


def dataset_info(name: str, task: str, rule: str, synthetic: bool, other: str | None) -> dict[str, Any]:
    return {
        "task": task,
        "instruction": f"Instruct: Given {name}\nQuery: ",
        "split_rule": rule,
        "synthetic": synthetic,
        "licence": "CC-BY 4.0",
        "train": 1000,
        "dev": 300,
        "test": 300,
        "documents": 1000,
        "documents_shared": 4,
        "near_duplicates_dropped": 12,
        "near_duplicates_left": 0,
        "rejected": 1,
        "evaluation_hash": evaluation_hash(name, other),
    }


def mining_audit(datasets: list[str]) -> dict[str, Any]:
    edges = [round(-1 + 0.05 * i, 2) for i in range(41)]
    centres = np.array(edges[:-1])

    def bell(mean: float, width: float, total: int) -> list[int]:
        return np.round(total * np.exp(-(((centres - mean) / width) ** 2))).astype(int).tolist()

    one = {
        "task": "retrieval",
        "way": "top 50 of the corpus, TopK-PercPos",
        "examples": 1000,
        "mined": 990,
        "dropped": {"no_positive": 10},
        "negatives": 3960,
        "negatives_given": 0,
        "negatives_per_example": {"4": 990},
        "with_fewer": 7,
        "with_fewer_share": 0.007,
        "searched_below_the_ceiling": 3,
        "candidates_decided": 5100,
        "rejected": {
            "known_positive": {"count": 800, "share": 0.157},
            "duplicate_of_positive_or_query": {"count": 3, "share": 0.001},
            "too_close_to_positive": {"count": 337, "share": 0.066},
            "repeats_a_kept_negative": {"count": 0, "share": 0.0},
        },
        "positive_ranks": {"1": 600, "2-5": 200, ">50": 200},
        "encoded": {
            "retriever": {
                "documents": {
                    "texts": 4031,
                    "truncated": 297,
                    "truncated_share": 297 / 4029,
                    "truncated_unknown": 0,
                    "rejected": {"is empty": 2},
                }
            }
        },
        "refused_by_rule": {
            "topk_abs 0.7": {"count": 500, "share": 0.025},
            "topk_perc_pos 0.95": {"count": 337, "share": 0.066},
        },
        "hubs": {"documents": 812, "largest": [{"id": "d1", "queries": 37}], "share_of_top_percent": 0.043},
        "near_duplicates": {
            "examples": 200,
            "negatives": 800,
            "near_duplicates_of_a_positive": 6,
            "near_duplicates_of_a_negative": 9,
            "jaccard": 0.8,
        },
        "score_histograms": {
            "edges": edges,
            "positives": bell(0.62, 0.2, 400),
            "negatives": bell(0.4, 0.15, 900),
            "rejected": bell(0.6, 0.1, 200),
        },
    }
    samples = {dataset: [{"query": "a private text"}] for dataset in datasets}
    return {
        "retriever": {"type": "package"},
        "rule": {"share": 0.95},
        "depth": 50,
        "datasets": dict.fromkeys(datasets, one),
        "samples": samples,
    }


@pytest.fixture(scope="session")
def make_run() -> Callable[..., HandMadeRun]:
    """`make_run(out, student=True, rename={})`: publishes every step of a run; `rename` maps data set names."""
    return build_run


def build_run(
    out: str,
    *,
    student: bool = True,
    rename: dict[str, str] | None = None,
    champion: dict[str, Any] | None = None,
    skill: dict[str, float] | None = None,
    other: str | None = None,
) -> HandMadeRun:
    """A complete run.

    Args:
        rename: data set names.
        champion: `champion_before` of the teacher's registration.
        skill: changes `SKILL`.
        other: data set with other held-out examples than usual.
    """
    names = {name: (rename or {}).get(name, name) for name in PRIMARY}
    sets = {names[name]: metric for name, metric in PRIMARY.items()}
    rules = {
        "cwe": ("retrieval", "by CVE id: all descriptions of a CVE are in one split", False),
        "hpo": ("retrieval", "by top-level branch of the ontology", False),
        "code": ("retrieval", "by module of the standard library", False),
        "hpo_classes": ("classification", "by top-level branch: held-out classes are never trained on", False),
        "hpo_similarity": ("sts", "by top-level branch; a pair's texts are in the same split", True),
    }
    info = {names[name]: dataset_info(names[name], *rule, other) for name, rule in rules.items()}
    score = functools.partial(scored, skills=SKILL | (skill or {}), other=other)
    run = HandMadeRun(out)
    run.step("prepare", {}, {"datasets": info})
    run.step("initialise", {**model(40)}, prepare="prepare")
    run.step("mine", {"audit.json": mining_audit([names[name] for name in ("cwe", "hpo", "code")])}, prepare="prepare")
    retrieval = [names[name] for name in RETRIEVAL_SETS]
    run.step(
        "stream_stage_1",
        {},
        mixed({retrieval[0]: 320, retrieval[1]: 240, retrieval[2]: 240}, dict.fromkeys(retrieval, 1 / 3)),
        StreamStep(weights=dict.fromkeys(retrieval, 2.0)),
        prepare="prepare",
        mine="mine",
        model="initialise",
    )
    run.step(
        "train_stage_1",
        {**model(41), "metrics.jsonl": curve(100, 3.0)},
        stream="stream_stage_1",
        model="initialise",
    )
    run.step(
        "stream_stage_2",
        {},
        mixed({retrieval[0]: 60, names["hpo_classes"]: 20}, {retrieval[0]: 0.75, names["hpo_classes"]: 0.25}),
        StreamStep(weights={retrieval[0]: 3.0, names["hpo_classes"]: 1.0}),
        prepare="prepare",
        mine="mine",
        model="train_stage_1",
    )
    run.step(
        "train_stage_2",
        {**model(42), "metrics.jsonl": curve(30, 1.2), "starts.jsonl": starts(0, 12, 12)},
        stream="stream_stage_2",
        model="train_stage_1",
    )
    run.step(
        "baselines",
        score({n: n for n in ("bm25", "minilm", "untrained")}, sets, BASELINE_NOTES),
        prepare="prepare",
        model="initialise",
    )
    run.step(
        "evaluate_teacher",
        score({"model": "teacher", "model@288": "teacher@288"}, sets),
        prepare="prepare",
        model="train_stage_2",
    )
    run.step(
        "register_teacher",
        {"registration.json": registration("teacher") | {"champion_before": champion}},
        model="train_stage_2",
        scores="evaluate_teacher",
    )
    if not student:
        return run
    embedded = {"datasets": {"vectors": {names["cwe"]: 300, names["hpo_classes"]: 100}, "holdout": {}}}
    run.step("teacher_embeddings", {}, embedded, prepare="prepare", model="train_stage_2")
    run.step("student_init", {**model(30)}, model="train_stage_2")
    run.step(
        "evaluate_student_init",
        score({"model": "student_before", "model@288": "student_before@288"}, sets),
        prepare="prepare",
        model="student_init",
    )
    whole = {"datasets": {"teacher vectors": {"usable": 400, "rows": 1000, "epochs": 2.5}}}
    run.step("stream_student", {}, whole, teacher_embeddings="teacher_embeddings", model="student_init")
    run.step(
        "train_student",
        {**model(31), "metrics.jsonl": curve(120, 0.9, gap=False)},
        stream="stream_student",
        model="student_init",
    )
    run.step(
        "evaluate_student",
        score({"model": "student", "model@288": "student@288"}, sets),
        prepare="prepare",
        model="train_student",
    )
    comparison = {
        "cosine_to_teacher": {
            "texts": 300,
            "before": {"through": "no projection", "576": {"value": 0.41, "low": 0.4, "high": 0.42}},
            "after": {
                "through": "the projection learned in training",
                "576": {"value": 0.913, "low": 0.909, "high": 0.917},
                "288": {"value": 0.887, "low": 0.882, "high": 0.892},
            },
        },
        "parameters": {"teacher": 49_545_216, "student": 38_925_504, "ratio": 0.786},
        "bytes": {"teacher": 198_180_864, "student": 155_702_016, "ratio": 0.786},
        "encode_cost": {
            "unit": "CPU seconds per 1,000 texts",
            "texts": 200,
            "threads": 1,
            "precision": "fp32",
            "teacher": 21.4,
            "student": 10.9,
            "ratio": 0.51,
        },
    }
    run.step(
        "compare_student",
        {"comparison.json": comparison},
        teacher_embeddings="teacher_embeddings",
        teacher="train_stage_2",
        before="student_init",
        student="train_student",
    )
    run.step(
        "register_student",
        {"registration.json": registration("student")},
        model="train_student",
        scores="evaluate_student",
    )
    return run


def registration(role: str) -> dict[str, Any]:
    return {
        "name": f"nvembed-{role}",
        "version": "1",
        "registry_uri": f"models:/nvembed-{role}/1",
        "content_hash": "cc",
        "run_id": "r",
        "score": 0.5,
        "aliases": ["candidate", "champion"],
        "promoted": True,
        "reason": "there was no champion",
    }
