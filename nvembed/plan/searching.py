"""Searching before it runs: operations, bytes, seconds, memory.

Rates are those of one core of an AMD EPYC with avx512_bf16, fitted to 1,024 and 8,192 queries x 10 k, 100 k and 1 M
documents x 384 (`tests/benchmarks/plan_mining_against_measured.py`). What is said of GPUs is arithmetic.
"""

from __future__ import annotations

import math

from nvembed.mining.config import Bm25Miner, MineConfig
from nvembed.plan.corpora import Corpus, Division
from nvembed.plan.encoding import busy, on_gpus
from nvembed.plan.hardware import CORE, Hardware
from nvembed.plan.memory import PROCESS_BYTES
from nvembed.retrieval.config import ExactIndex

# Bytes a stored number takes in a shard (`retrieval/shards.py`: bf16 1.4-2), and a row besides (key; int8's scale).
STORED = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.14}
NUMBER = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # of a number itself
ROW_BYTES, SCALE_BYTES = 15.0, 4.0
LISTS = 2  # plain, and under the rule's ceiling
PRODUCT_SHARE = 0.92  # of the peak, in the products
SCAN_SECONDS = 1.26e-9  # a pair's score is held against the cut
PROPOSAL_SECONDS = 0.237e-6  # a pair is scored again and sorted in; each list of k meets about k ln(N / k) of them
READ_BYTES_PER_SECOND = 0.8e9  # parquet into numpy
NUMBER_SECONDS = 4.6e-9  # a document's number is rounded and measured
START_SECONDS = 0.15  # of a task
# On a GPU: share assumed; a score is written to memory and read again, 2 bytes each (nothing is fused).
GPU_PRODUCT_SHARE, GPU_SCORE_BYTES = 0.65, 4.0
SEGMENT_BYTES = 144 * 2**20  # documents searched together, fp32 and bf16 (`retrieval/search.py`)
TILE_BYTES = 1024 * 8192 * (2 + 1 + 4)  # scores of a block of queries and a tile of documents, and what is made of them
ID_BYTES = 90  # a found document: score, reference, string
QUERY_ROW_BYTES = 1500  # a query's text and lists in Python
BM25_BYTES = 1000.0  # a document in BM25's index: assumed


def search_flops(queries: int, documents: int, dim: int) -> int:
    """Operations of all products: 2 for each number of each pair."""
    return 2 * queries * documents * dim


def shard_bytes(rows: int, dim: int, kind: str) -> float:
    """Bytes of a set's vector files."""
    return rows * (dim * STORED[kind] + ROW_BYTES + (SCALE_BYTES if kind == "int8" else 0.0))


def search_core_seconds(
    queries: int, documents: int, dim: int, *, depth: int, read_bytes: float, hardware: Hardware, gpu: bool
) -> float:
    """Seconds of one device for one task: reading, products, what is done with the scores."""
    pairs = float(queries) * documents
    if gpu:
        products = search_flops(queries, documents, dim) / (hardware.peak_tflops * 1e12 * GPU_PRODUCT_SHARE)
        scan = pairs * GPU_SCORE_BYTES / (hardware.bandwidth_gb_s * 1e9)
    else:
        products = search_flops(queries, documents, dim) / (hardware.peak_tflops * 1e12 * PRODUCT_SHARE)
        scan = pairs * SCAN_SECONDS
    proposals = queries * LISTS * depth * max(math.log(documents / depth), 1.0)
    reading = read_bytes / READ_BYTES_PER_SECOND + documents * dim * NUMBER_SECONDS
    return START_SECONDS + products + scan + proposals * PROPOSAL_SECONDS + reading


def search_seconds(corpus: Corpus, cut: Division, dim: int, config: MineConfig, hardware: Hardware) -> float:
    """Seconds of a pool over a whole corpus, its start apart."""
    assert corpus.queries is not None and corpus.documents is not None
    gpu = config.search.device != "cpu" and on_gpus(config.encode.gpus_per_actor, hardware)
    device = hardware if gpu or hardware.kind == "cpu" else CORE
    gpus = config.encode.gpus_per_actor if gpu else 0.0
    count = busy(config.encode.actors, config.encode.threads_per_actor, gpus, hardware) or 1.0
    documents = -(-corpus.documents // cut.parts)
    one = search_core_seconds(
        cut.group_rows, documents, dim, depth=config.depth,
        read_bytes=shard_bytes(documents, dim, config.encode.vector_type), hardware=device, gpu=gpu,
    )  # fmt: skip
    groups = corpus.queries / cut.group_rows  # the last of them is not full
    return one * groups * cut.parts / min(count, float(cut.tasks))


def search_memory(cut: Division, dim: int, documents: int, config: MineConfig) -> float:
    """Bytes of one searching actor at its peak, on the host: queries stay, documents stream by."""
    queries = cut.group_rows * (dim * 6.0 + QUERY_ROW_BYTES + 2 * config.depth * ID_BYTES * 2)
    if isinstance(config.search.index, ExactIndex):
        held = float(SEGMENT_BYTES + TILE_BYTES)
    else:
        held = 3.0 * 4 * dim * -(-documents // cut.parts)  # shards, their sum, and FAISS' own
    if any(isinstance(miner, Bm25Miner) for miner in config.more_miners):
        held += documents * BM25_BYTES
    return PROCESS_BYTES + queries + held
