"""The cost of searching: operations, bytes, seconds, memory.

Rates of a core are fitted to one of an AMD EPYC with avx512_bf16: 1,024 to 8,192 queries x 10 k to 1 M documents x 384
and 1,024, depth 50 and 100 (`tests/benchmarks/plan_mining_against_measured.py`); depth made no difference there. Those
of a GPU to two searches on one H100 (`tests/benchmarks/gpu_retrieval.py`), whose time went into merging on the host.
"""

from __future__ import annotations

import math

from nvembed.mining.config import Bm25Retriever, MineConfig
from nvembed.plan.corpora import Corpus, Division
from nvembed.plan.encoding import busy, on_gpus
from nvembed.plan.hardware import CORE, Hardware
from nvembed.plan.memory import PROCESS_BYTES
from nvembed.retrieval.config import ExactIndex

# Bytes a stored number takes in a shard (`retrieval/shards.py`: bf16 1.4-2), and a row besides (key; int8's scale).
STORED = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.14}
NUMBER = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # of a number itself
ROW_BYTES, SCALE_BYTES = 15.0, 4.0
START_SECONDS = 0.13  # of a task
PRODUCT_SHARE = 0.71  # of a core's peak, the scores' comparison with the cut included
READ_BYTES_PER_SECOND = 0.8e9  # parquet into numpy, one thread
NUMBER_SECONDS = {"cpu": 4.9e-9, "gpu": 0.5e-9}  # a document's number is rounded and measured (and sent)
# A query's finalists are scored in fp64 and merged after every segment; the more documents, the more were proposed.
SETTLE_SECONDS, PROPOSE_SECONDS = 161e-9, 34.3e-9  # of a core, for a dimension: by segment, by ln(documents / depth)
GPU_SETTLE_SECONDS = 46e-6  # by segment, on the host
# On a GPU products are far from what bounds: share assumed; a score is written to memory and read again, 2 bytes each.
GPU_PRODUCT_SHARE, GPU_SCORE_BYTES = 0.65, 4.0
SEGMENT_NUMBERS = 24 * 2**20  # of the documents searched together (`retrieval/search.py`)
SEGMENT_BYTES = 6 * SEGMENT_NUMBERS  # fp32 and bf16
TILE_BYTES = 1024 * 8192 * (2 + 1 + 4)  # scores of a block of queries and a tile of documents, and what is made of them
ID_BYTES = 90  # a candidate: score, reference, string
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
    """Seconds of one device for one task: reading, products, rescoring of the proposed candidates."""
    kind, pairs = "gpu" if gpu else "cpu", float(queries) * documents
    share = GPU_PRODUCT_SHARE if gpu else PRODUCT_SHARE
    products = search_flops(queries, documents, dim) / (hardware.peak_tflops * 1e12 * share)
    segments = -(-documents * dim // SEGMENT_NUMBERS)
    if gpu:
        products += pairs * GPU_SCORE_BYTES / (hardware.bandwidth_gb_s * 1e9)
        settling = queries * segments * GPU_SETTLE_SECONDS
    else:
        proposed = max(math.log(documents / depth), 1.0)
        settling = queries * dim * (segments * SETTLE_SECONDS + proposed * PROPOSE_SECONDS)
    reading = read_bytes / READ_BYTES_PER_SECOND + documents * dim * NUMBER_SECONDS[kind]
    return START_SECONDS + products + settling + reading


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
        documents_bytes = TILE_BYTES + min(SEGMENT_BYTES, 6.0 * documents * dim)
    else:
        documents_bytes = 3.0 * 4 * dim * -(-documents // cut.parts)  # shards, their sum, and FAISS' own
    if any(isinstance(retriever, Bm25Retriever) for retriever in config.more_retrievers):
        documents_bytes += documents * BM25_BYTES
    return PROCESS_BYTES + queries + documents_bytes
