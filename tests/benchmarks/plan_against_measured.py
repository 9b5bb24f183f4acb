"""Predicted against measured: the plan of a recipe beside what a finished run of it took.

    python tests/benchmarks/plan_against_measured.py runs/quickstart [--hardware laptop]
    python tests/benchmarks/plan_against_measured.py runs/quickstart --record "2 idle cores of ..." > measured.json

Reads `recipe.yaml`, `steps.json` and the training steps' `metrics.jsonl`. Training is shown twice: with the plan's
assumption about the length of texts (0.5 x max_length), and with the tokens that were really there. `--record` prints
what was measured instead, for `tests/assets/measured/quickstart.json`, which `tests/plan/test_hours.py` holds the plan
against.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nvembed.plan.hardware import find_hardware
from nvembed.plan.hours import train_seconds
from nvembed.plan.memory import GIB, stage_memory
from nvembed.plan.recipe_plan import plan_recipe, precision_of
from nvembed.plan.sizes import StageSizes, stage_sizes
from nvembed.plan.work import time_text
from nvembed.recipe.schema import load_recipe


def measured_steps(out: Path) -> dict[str, dict[str, float]]:
    """Seconds and memory of each pipeline step, summed over the runs of an output."""
    found: dict[str, dict[str, float]] = {}
    for attempt in json.loads((out / "steps.json").read_text())["attempts"]:
        for name, step in attempt["steps"].items():
            if step["status"] != "skipped":
                entry = found.setdefault(name, {"seconds": 0.0, "peak_mb": 0.0})
                entry["seconds"] += step["seconds"]
                entry["peak_mb"] = max(entry["peak_mb"], step["peak_pss_mb"] or 0.0)
    return found


def rows(out: Path, stage: str) -> list[dict[str, Any]]:
    """The optimiser steps of a stage."""
    return [json.loads(line) for line in (out / f"train_{stage}" / "metrics.jsonl").read_text().splitlines()]


def record(out: Path, machine: str) -> dict[str, Any]:
    """What a run took, as plain values; `machine` in words."""
    stages = {}
    for sizes in stage_sizes(load_recipe(str(out / "recipe.yaml"))):
        taken = rows(out, sizes.name)
        stages[sizes.name] = {"steps": len(taken), "texts": sizes.texts, "tokens": sum(row["tokens"] for row in taken)}
    seconds = {name: round(step["seconds"], 1) for name, step in measured_steps(out).items()}
    return {"machine": machine, "seconds": seconds, "stages": stages}


def line(name: str, predicted: float, measured: float, note: str = "") -> str:
    """One comparison."""
    return f"{name:<24}{time_text(predicted):>12}{time_text(measured):>12}{predicted / measured:8.2f}  {note}".rstrip()


def compare(out: Path, hardware_name: str) -> str:
    """The whole table."""
    recipe, hardware = load_recipe(str(out / "recipe.yaml")), find_hardware(hardware_name)
    plan, measured = plan_recipe(recipe, hardware), measured_steps(out)
    lines = [f"{'step':<24}{'predicted':>12}{'measured':>12}   ratio"]
    together = [0.0, 0.0]
    for step in plan.steps:
        if step.name in measured and step.seconds is not None:
            lines.append(line(step.name, step.seconds, measured[step.name]["seconds"]))
            together = [together[0] + step.seconds, together[1] + measured[step.name]["seconds"]]
    lines += [line("together", together[0], together[1]), "", "training with the tokens that were there:"]
    for report in plan.stages:
        lines += _training(report.sizes, rows(out, report.sizes.name), hardware, measured)
    return "\n".join(lines)


def _training(
    sizes: StageSizes, taken: list[dict[str, Any]], hardware: Any, measured: dict[str, dict[str, float]]
) -> list[str]:
    tokens = sum(row["tokens"] for row in taken)
    length = tokens / (len(taken) * sizes.texts)
    most = max(row["tokens"] for row in taken) / sizes.texts
    seconds, name = train_seconds(sizes, hardware, length), f"train_{sizes.name}"
    memory = stage_memory(sizes, precision=precision_of(sizes), length=most)
    peak = measured[name]["peak_mb"] / 1024
    note = f"{length:.1f} tokens a text of {sizes.max_length}; at most {most:.1f} in a step's mean"
    said = f"  workers together {sizes.workers * memory.total / GIB:.2f} GiB predicted; the whole run {peak:.2f} GiB"
    return [
        line(name, seconds, measured[name]["seconds"], note),
        said + " (driver, Ray and page cache of maps included)",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hardware", default="laptop")
    parser.add_argument("--record", metavar="MACHINE", help="Print what was measured; the machine in words.")
    arguments = parser.parse_args()
    if arguments.record:
        print(json.dumps(record(arguments.out, arguments.record), indent=2))
    else:
        print(compare(arguments.out, arguments.hardware))


if __name__ == "__main__":
    main()
