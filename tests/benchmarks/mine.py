"""Mining against raw FAISS flat and both paths of sentence-transformers' `mine_hard_negatives`.

    OMP_NUM_THREADS=1 python tests/benchmarks/mine.py [--queries 1024] [--documents 100000] [--rounds 3] [--no-peer]

CPU seconds of one thread, interleaved in one run, over the same ready vectors: the peer gets a model that returns them,
so that embedding costs nothing. Ten negatives per query under TopK-PercPos 0.95. FAISS flat only searches (its top 102,
what the peer asks it for); it selects nothing. Prints ratios peer / ours, the share of the negatives that a plain fp64
ranking gives, our Python per query after the search, and the growth of the resident set of each.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COUNT = 10
RULE = {"type": "topk_perc_pos", "max_negative_to_positive_ratio": 0.95}


def helpers() -> Any:
    """`search.py` beside this file."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("search_benchmark", Path(__file__).with_name("search.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer(query: np.ndarray, matrix: np.ndarray, positives: np.ndarray) -> Callable[[bool], Any]:
    """`mine_hard_negatives` with a model that looks vectors up."""
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    class Lookup(SentenceTransformer):
        def __init__(self) -> None:
            super().__init__(modules=[torch.nn.Identity()], device="cpu", similarity_fn_name="dot")

        def encode(self, sentences: Any, **_: Any) -> np.ndarray:
            return np.stack([(query if text[0] == "q" else matrix)[int(text[1:])] for text in sentences])

        def get_embedding_dimension(self) -> int:
            return int(matrix.shape[1])

        encode_query = encode
        encode_document = encode

    rows = Dataset.from_dict(
        {"query": [f"q{index}" for index in range(len(query))], "answer": [f"d{row}" for row in positives]}
    )
    corpus = [f"d{row}" for row in range(len(matrix))]
    model = Lookup()

    def run(use_faiss: bool) -> Any:
        return mine_hard_negatives(
            rows,
            model,
            corpus=corpus,
            num_negatives=COUNT,
            relative_margin=0.05,
            sampling_strategy="top",
            output_format="n-tuple",
            use_faiss=use_faiss,
            batch_size=16384,
            verbose=False,
        )

    return run


def grown(function: Callable[[], Any], resident: Callable[[], int]) -> float:
    """MiB by which the resident set exceeds its start at its peak, sampled each 5 ms."""
    gc.collect()
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    function()
    done.set()
    thread.join()
    return max(peak - before, 0) / 2**20


def after_search(query: np.ndarray, matrix: np.ndarray, positives: list[list[int]]) -> float:
    """Microseconds per query of what `mine_vectors` does beside searching."""
    from unittest import mock

    from nvembed import mine_vectors
    from nvembed.mining import api

    search, spent = api.search_shards, 0.0

    def timed(*arguments: Any, **options: Any) -> Any:
        nonlocal spent
        started = time.thread_time()
        found = search(*arguments, **options)
        spent += time.thread_time() - started
        return found

    with mock.patch.object(api, "search_shards", timed):
        started = time.thread_time()
        mine_vectors(query, matrix, positives, COUNT, RULE)
    return (time.thread_time() - started - spent) / len(query) * 1e6


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="FAISS flat only")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    import faiss
    import torch

    from nvembed import mine_vectors

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    bench = helpers()
    query, matrix, rows = bench.problem(arguments.queries, arguments.documents)
    positives = [[int(row)] for row in rows]

    def flat() -> np.ndarray:
        index = faiss.IndexFlatIP(matrix.shape[1])
        index.add(matrix)
        return index.search(query, 102)[1]

    variants: dict[str, Callable[[], Any]] = {
        "ours": lambda: mine_vectors(query, matrix, positives, COUNT, RULE),
        "faiss_flat": flat,
    }
    if not arguments.no_peer:
        run = peer(query, matrix, rows)
        variants |= {"st_faiss": lambda: run(True), "st_torch": lambda: run(False)}
    growth = {name: grown(variant, bench.resident) for name, variant in variants.items()}
    seconds, results = bench.interleaved(variants, arguments.rounds)
    sample = slice(0, 256)
    scores = query[sample].astype(np.float64) @ matrix.astype(np.float64).T
    lowest = scores[np.arange(len(scores)), rows[sample]]
    scores[scores >= (lowest - 0.05 * np.abs(lowest))[:, None]] = -np.inf
    truth = np.argsort(-scores, axis=1, kind="stable")[:, :COUNT]
    report = {
        "queries": arguments.queries,
        "documents": arguments.documents,
        "cpu_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio_to_ours": {name: bench.ratios(seconds, name, "ours") for name in variants if name != "ours"},
        "overlap_with_exact": bench.overlap(results["ours"][sample], truth),
        "python_us_per_query_after_search": after_search(query, matrix, positives),
        "rss_growth_mib": growth,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
