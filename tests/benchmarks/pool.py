"""What Ray costs an encoding run: one actor against a plain loop in this process, two actors against one.

    python tests/benchmarks/pool.py [--shards 40] [--texts 128] [--rounds 3]

Shards of the quickstart's texts, one thread each, at least 50 ms a shard. Prints, per round and as medians: texts per
wall second from the first shard's end to the last's (steady state: actors stand, models are loaded), the ratio of one
actor to the loop, and CPU seconds per 1,000 texts of two actors over those of one, with the wall ratio beside it. Run
it on an idle machine of at least three cores, or believe the CPU seconds only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from encode import texts

from nvembed.core.parquet import list_shards
from nvembed.core.ray_cluster import ensure_ray
from nvembed.core.ray_tasks import run_pool
from nvembed.core.vectors import write_text_shards
from nvembed.retrieval.config import EncodeConfig, PackageModel
from nvembed.retrieval.encode import Encoding, EncodingWork, ShardEncoder


def loop(arguments: dict[str, Any], tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`run_pool` without Ray."""
    worker = ShardEncoder(**arguments)
    for task in tasks:
        started = time.process_time()
        yield {**worker.work(task), "cpu_seconds": time.process_time() - started}


def steady(results: Iterator[dict[str, Any]]) -> tuple[float, float]:
    """(texts per second after the first result, CPU seconds per 1,000 texts)."""
    ends, rows, cpu = [], [], 0.0
    for result in results:
        ends.append(time.perf_counter())
        rows.append(result["rows"])
        cpu += result["cpu_seconds"]
    return sum(rows[1:]) / (ends[-1] - ends[0]), 1000 * cpu / sum(rows)


def main() -> None:
    """Interleaved rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--texts", type=int, default=128, help="of a shard")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    ensure_ray()
    found: dict[str, list[tuple[float, float]]] = {"loop": [], "one actor": [], "two actors": []}
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "texts")
        rows = ((str(number), text, "") for number, text in enumerate(islice(texts(), chosen.shards * chosen.texts)))
        write_text_shards(rows, source, chosen.texts)
        tasks = [{"encoding": 0, "name": name} for name in list_shards(source)]
        for number in range(chosen.rounds):
            for name in found:
                encoding = Encoding(source, PackageModel(), os.path.join(folder, f"{number}-{name}"))
                works = [EncodingWork(encoding, "benchmark")]
                arguments = {"works": works, "config": EncodeConfig(threads_per_actor=1)}
                actors = {"one actor": 1, "two actors": 2}.get(name)
                run = (
                    loop(arguments, tasks)
                    if actors is None
                    else run_pool(ShardEncoder, arguments, tasks, actors=actors)
                )
                found[name].append(steady(run))
                print(f"{name}: {found[name][-1][0]:.0f} texts/s, {found[name][-1][1]:.2f} CPU s per 1,000", flush=True)
    wall = [ray[0] / plain[0] for ray, plain in zip(found["one actor"], found["loop"], strict=True)]
    cpu = [two[1] / one[1] for two, one in zip(found["two actors"], found["one actor"], strict=True)]
    both = [two[0] / one[0] for two, one in zip(found["two actors"], found["one actor"], strict=True)]
    for what, ratios in (
        ("one actor / loop, texts per second", wall),
        ("two actors / one, CPU seconds per text", cpu),
        ("two actors / one, texts per second", both),
    ):
        print(f"{what}: {statistics.median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}]")


if __name__ == "__main__":
    main()
