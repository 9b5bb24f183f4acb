"""What each section of `report.html` shows, computed from a report; `templates/report.html` shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nvembed.evaluation.significance import MEAN
from nvembed.report.charts import Chart, Dot, bar_chart, line_chart, point_chart
from nvembed.report.collect import gap
from nvembed.report.schema import Difference, Environment, Interval, Mixed, Model, Report, Size
from nvembed.report.scores import score_tables
from nvembed.report.systems import all_tables, mean_retrieval, retrieval_scores
from nvembed.report.words import mark_kind, score, short_name, signed, system_name

Curves = Mapping[str, Sequence[Mapping[str, Any]]]  # rows of `metrics.jsonl` by training step

REASONS = {
    "known_positive": "known positive",
    "duplicate_of_positive_or_query": "same text as the positive or query",
    "too_close_to_positive": "score too close to the positive's",
    "repeats_a_kept_negative": "same text as a selected negative",
    "nearly_repeats_a_positive": "near duplicate of a positive",
    "candidate_filter_finds_too_close": "reranker's score too close to the positive's",
}


class Card(NamedTuple):
    """A number of the headline, its name and its meaning."""

    title: str
    value: str
    note: str


def run_sections(report: Report, curves: Curves) -> dict[str, Any]:
    """Title of a section -> what it shows, as described in the template; a section with an empty value is left out."""
    return {
        "In short": list(_headline(report)),
        "Scores": score_tables(report),
        "Differences": by_pair(report.comparisons),
        "Size and quality": _sizes(report),
        "Student against teacher": {"widths": _widths(report.student)} if report.student is not None else None,
        "Training": {"charts": list(_training_charts(report, curves))} if report.training or curves else None,
        "Data mix": [{"step": step, "mix": mix, "tasks": list(_tasks(mix))} for step, mix in report.mixes.items()],
        "Negatives": _mining(report.mining) if report.mining is not None else None,
        "Data sets": {"limits": _source_limits(report.resolved_recipe)} if report.datasets else None,
        "Steps": report.steps,
        "Lineage": _lineage(report) if report.lineage else None,
        "Environment": environment_facts(report.environment),
    }


def _headline(report: Report) -> Iterator[Card]:
    tables = {**report.baselines, **report.scores}
    for name in ("teacher", "student"):
        values = retrieval_scores(tables.get(name, {}))
        if values:
            sets = f"mean nDCG@10 of {len(values)} retrieval set{'s' if len(values) > 1 else ''}"
            yield Card(name, score(sum(values) / len(values)), sets)
    for row in report.comparisons:
        if row.over == MEAN and row.b in ("untrained", "bm25", "student_before"):
            interval = f"nDCG@10, 95 % interval {signed(row.low)} to {signed(row.high)}"
            yield Card(f"{system_name(row.a)} against {system_name(row.b)}", signed(row.value), interval)
    for share in report.shares:
        note = "of the teacher's mean nDCG@10"
        if share.system != "student":
            note += f"; {100 * share.of_student:.0f} % of the full student's"
        yield Card(f"{system_name(share.system)} keeps", f"{100 * share.of_teacher:.0f} %", note)


def by_pair(differences: Iterable[Difference]) -> dict[tuple[str, str], list[Difference]]:
    """Differences by the two systems compared."""
    pairs: dict[tuple[str, str], list[Difference]] = {}
    for row in differences:
        pairs.setdefault((row.a, row.b), []).append(row)
    return pairs


# -- size and quality -------------------------------------------------------------------------------------------------


def _sizes(report: Report) -> dict[str, Any] | None:
    measured = measured_systems(report)
    if len(measured) < 2:
        return None
    by_size = [size_dot(short_name(name), name, size, mean) for name, (size, mean) in measured.items()]
    by_cost = [
        dot._replace(cost=size.encode_seconds)
        for dot, (size, _) in zip(by_size, measured.values(), strict=True)
        if size.encode_seconds is not None
    ]
    charts = [point_chart("Quality by size", "million parameters", "mean nDCG@10", by_size)]
    if by_cost:
        charts.append(point_chart("Quality by encode cost", "CPU seconds per 1,000 texts", "mean nDCG@10", by_cost))
    best_first = sorted(measured.items(), key=lambda item: -item[1][1].value)
    rows = [{"system": name, "mean": mean, "size": size, "dim": _dim(name, size)} for name, (size, mean) in best_first]
    return {"charts": charts, "rows": rows}


def measured_systems(report: Report) -> dict[str, tuple[Size, Interval]]:
    """Systems whose size and mean score are known; a prefix has its model's size. BM25 has no parameters."""
    systems = {}
    for name, table in all_tables(report).items():
        size, mean = report.sizes.get(name.partition("@")[0]), report.means.get(name)
        if size is not None and mean is None and (value := mean_retrieval(table)) is not None:
            mean = Interval(value=value, low=value, high=value)
        if size is not None and mean is not None:
            systems[name] = (size, mean)
    return systems


def size_dot(label: str, system: str, size: Size, mean: Interval) -> Dot:
    """A system in a chart of quality by millions of parameters."""
    return Dot(label, mark_kind(system), mean.value, mean.low, mean.high, size.parameters / 1e6)


def _dim(system: str, size: Size) -> int | None:
    """Numbers per text: those of the prefix, or of the whole embedding."""
    prefix = system.partition("@")[2]
    return int(prefix) if prefix.isdigit() else size.dim


def _widths(student: Mapping[str, Any]) -> list[str]:
    """Widths at which the student's embeddings were compared with the teacher's, widest first."""
    after = student["cosine_to_teacher"]["after"]
    return sorted((width for width, value in after.items() if isinstance(value, Mapping)), key=int, reverse=True)


# -- training and its data --------------------------------------------------------------------------------------------


def _training_charts(report: Report, curves: Curves) -> Iterator[Chart]:
    for step, rows in curves.items():
        restarts = [float(restart.step) for restart in report.training[step].restarts]
        losses = [(float(row["step"]), float(row["loss"])) for row in rows]
        yield line_chart(f"{step}: loss", "optimiser step", "loss", losses, restarts)
        gaps = [(float(row["step"]), value) for row in rows if (value := gap(row)) is not None]
        if gaps:
            yield line_chart(f"{step}: gap", "optimiser step", "gap", gaps, restarts)


def _tasks(mix: Mapping[str, Mixed]) -> Iterator[dict[str, Any]]:
    """Shares of the tasks in a data mix; nothing where all data sets have one task."""
    tasks = dict.fromkeys(dataset.task for dataset in mix.values())
    for task in tasks if len(tasks) > 1 else ():
        members = [dataset for dataset in mix.values() if dataset.task == task]
        weighted = [dataset.asked for dataset in members if dataset.asked is not None]
        yield {
            "task": task or "unknown",
            "configured": sum(weighted) if weighted else None,
            "realised": sum(dataset.realised for dataset in members),
        }


def _mining(mining: Mapping[str, Any]) -> dict[str, Any]:
    """The audit's data sets and the columns of their tables.

    Texts of the audit's samples stay in `audit.json`: a report is passed on, and a corpus may be private.
    """
    sets: Mapping[str, Mapping[str, Any]] = mining["datasets"]
    reasons = _keys(audit["rejected"] for audit in sets.values())
    charts = []
    for name, audit in sets.items():
        histograms = audit["score_histograms"]
        series = {kind: histograms[kind] for kind in ("positives", "negatives", "rejected")}
        if any(any(counts) for counts in series.values()):
            charts.append(bar_chart(f"{name}: scores", "similarity to the query", histograms["edges"], series))
    return {
        "sets": sets,
        "encoded": [
            (name, model, kind, texts)
            for name, audit in sets.items()
            for model, kinds in audit.get("encoded", {}).items()
            for kind, texts in kinds.items()
        ],
        "hubs": {name: audit for name, audit in sets.items() if (audit.get("hubs") or {}).get("documents")},
        "reasons": {reason: REASONS.get(reason, reason.replace("_", " ")) for reason in reasons},
        "rules": _keys(audit.get("refused_by_rule") or {} for audit in sets.values()),
        "ranks": sorted(_keys(audit.get("positive_ranks") or {} for audit in sets.values()), key=_rank_order),
        "charts": charts,
    }


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """All keys, each once."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _rank_order(bucket: str) -> tuple[bool, int]:
    return bucket.startswith(">"), int(bucket.strip(">").split("-")[0])


def _source_limits(recipe: Mapping[str, Any]) -> dict[str, str]:
    """The limits that a recipe sets for its sources: `1,000 documents, 300 test`."""
    limits = {}
    for source in (recipe.get("prepare") or {}).get("sources") or []:
        numbers = {key.removeprefix("max_"): value for key, value in source.items() if key.startswith("max_")}
        text = ", ".join(f"{value:,} {key}" for key, value in numbers.items() if isinstance(value, int) and value)
        if "name" in source and text:
            limits[source["name"]] = text
    return limits


# -- where the results come from --------------------------------------------------------------------------------------


def _lineage(report: Report) -> dict[str, Any]:
    """A chain of steps for each model, and the step that made each result."""
    owners = _owners(report)
    chains = []
    for role, model in report.models.items():
        maker = _maker(model)
        if maker in report.lineage:
            chains.append({"role": role, "step": maker, "steps": ancestors(report, maker), "uri": model.registry_uri})
    return {"chains": chains, "owners": owners}


def _maker(model: Model) -> str:
    """The step that made a model folder, `<output>/<step>/model`."""
    return model.folder.rstrip("/").rsplit("/", 2)[-2]


def _owners(report: Report) -> dict[str, str]:
    return {entry.manifest_hash: name for name, entry in report.lineage.items()}


def ancestors(report: Report, step: str) -> list[str]:
    """The steps a result depends on, directly or not, and the step itself, in the order of the run."""
    owners, steps, waiting = _owners(report), {step}, [step]
    while waiting:
        for source in report.lineage[waiting.pop()].inputs.values():
            owner = owners.get(source.manifest_hash)
            if owner is not None and owner not in steps:
                steps.add(owner)
                waiting.append(owner)
    return [name for name in report.lineage if name in steps]


def environment_facts(environment: Environment) -> dict[str, str]:
    """Machine and versions in words."""
    return {
        "processor": f"{environment.processor}, {environment.cpus} CPUs, bf16 {'yes' if environment.bf16 else 'no'}",
        "memory": f"{environment.memory_gib} GiB",
        "system": f"{environment.platform}, Python {environment.python}",
        **environment.packages,
    }
