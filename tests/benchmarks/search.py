"""Exact search against FAISS flat: CPU seconds of one thread, interleaved in one run, and memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/search.py [--queries 1024 5000] [--documents 100000] [--rounds 5]
    OMP_NUM_THREADS=1 python tests/benchmarks/search.py --memory 1000000

Vectors are generated: clusters on the unit sphere, 384 dimensions, queries near a document of theirs. Prints medians
and min..max of the ratios FAISS / ours within a round, the share of the fp64 top k that each found, and what one bf16
(fp32) product of the same shape costs: nothing can be faster than that. `--memory` streams generated shards past 1,024
queries and prints the growth of the resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

DIM = 384


def vectors(count: int, generator: np.random.Generator, centres: np.ndarray) -> np.ndarray:
    """float32 unit vectors around centres."""
    matrix = generator.standard_normal((count, DIM), dtype=np.float32)
    matrix += 0.7 * centres[generator.integers(len(centres), size=count)]
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix


def problem(queries: int, documents: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, documents, and the document each query belongs to."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((200, DIM)).astype(np.float32)
    matrix = vectors(documents, generator, centres)
    positives = generator.integers(documents, size=queries)
    noise = generator.standard_normal((queries, DIM)).astype(np.float32)
    near = matrix[positives] + noise * generator.uniform(0.02, 0.1, (queries, 1)).astype(np.float32)
    return near / np.linalg.norm(near, axis=1, keepdims=True), matrix, positives


def interleaved(
    variants: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.thread_time
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds (CPU of this thread, by default) of every variant, A B C A B C ..., and each one's last result."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    results: dict[str, Any] = {}
    for variant in variants.values():
        variant()  # once unmeasured: libraries allocate and pick their kernels
    for _ in range(rounds):
        for name, variant in variants.items():
            started = clock()
            results[name] = variant()
            seconds[name].append(clock() - started)
    return seconds, results


def ratios(seconds: dict[str, list[float]], peer: str, ours: str) -> dict[str, float]:
    """How many times the peer's time is ours, round by round."""
    values = [theirs / own for theirs, own in zip(seconds[peer], seconds[ours], strict=True)]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of the true rows that were found."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


def truth(queries: np.ndarray, documents: np.ndarray, k: int) -> np.ndarray:
    """Top k by fp64 products, ties by row (numpy, for a sample of the queries)."""
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def compare(queries: int, documents: int, k: int, rounds: int) -> dict[str, Any]:
    """Top k of raw FAISS, of ours, and the bare products."""
    import faiss
    import torch

    from nvembed import search_vectors

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    query, matrix, _ = problem(queries, documents)

    def flat() -> np.ndarray:
        index = faiss.IndexFlatIP(DIM)
        index.add(matrix)
        return index.search(query, k)[1]

    def product(dtype: torch.dtype) -> None:
        left, right = torch.from_numpy(query).to(dtype), torch.from_numpy(matrix).to(dtype)
        for start in range(0, len(left), 1024):
            for row in range(0, len(right), 8192):
                left[start : start + 1024] @ right[row : row + 8192].T

    variants = {
        "faiss_flat": flat,
        "ours": lambda: search_vectors(query, matrix, k)[0],
        "product_bf16": lambda: product(torch.bfloat16),
    }
    seconds, results = interleaved(variants, rounds)
    exact = truth(query[:256], matrix, k)
    return {
        "queries": queries,
        "documents": documents,
        "k": k,
        "cpu_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "faiss_flat / ours": ratios(seconds, "faiss_flat", "ours"),
        "ours / bf16 product": ratios(seconds, "ours", "product_bf16"),
        "overlap_with_fp64": {name: overlap(results[name][:256], exact) for name in ("ours", "faiss_flat")},
    }


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(documents: int, queries: int, shard: int = 65536) -> dict[str, Any]:
    """Growth of the resident set while generated shards stream past."""
    from nvembed import search_vectors

    generator = np.random.default_rng(0)
    centres = generator.standard_normal((200, DIM)).astype(np.float32)
    query = vectors(queries, generator, centres)
    search_vectors(query[:8], vectors(1000, generator, centres), 10)
    before = resident()
    peak = before

    def shards() -> Iterator[np.ndarray]:
        nonlocal peak
        for start in range(0, documents, shard):
            matrix = vectors(min(shard, documents - start), generator, centres)
            peak = max(peak, resident())
            yield matrix
            peak = max(peak, resident())

    search_vectors(query, shards(), 100)
    return {
        "documents": documents,
        "queries": queries,
        "growth_mib": (max(peak, resident()) - before) / 2**20,
        "shard_mib": shard * DIM * 4 / 2**20,
    }


def main() -> None:
    """Print one JSON object per setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, nargs="+", default=[1024, 5000])
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, metavar="DOCUMENTS")
    arguments = parser.parse_args()
    if arguments.memory:
        for queries in arguments.queries:
            print(json.dumps(memory(arguments.memory, queries)), flush=True)
        return
    for queries in arguments.queries:
        print(json.dumps(compare(queries, arguments.documents, arguments.k, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
