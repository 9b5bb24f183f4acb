"""Encoding and exact search on one GPU against sentence-transformers; wall seconds, interleaved in one run.

    python tests/benchmarks/gpu_retrieval.py [--documents 1000000] [--queries 5000] [--texts 4096] [--rounds 3]

Encoding: random weights of two shapes (MiniLM's: 6 layers x 384; a decoder's of 28 layers x 1,024), the Python standard
library's functions as texts. Search: generated vectors of 384 dimensions in host memory; the peer is
sentence-transformers' `semantic_search` with both sides on the GPU (chunks of 500,000 documents). One JSON line each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from search import interleaved, overlap, problem, truth

from nvembed import search_vectors
from nvembed.data.config import StdlibCodeSource
from nvembed.data.sources.stdlib_code import read_stdlib_code
from nvembed.retrieval.config import PretrainedModel
from nvembed.retrieval.encoders import open_encoder


def code_texts(count: int) -> list[str]:
    """Functions of the standard library, of mixed length, in a fixed mixed order."""
    rows = read_stdlib_code(StdlibCodeSource(type="stdlib_code", name="code", instruction="stdlib_code"))
    texts = [document.text for document in rows.documents]
    order = np.random.default_rng(0).permutation(len(texts))
    texts = [texts[index] for index in order]
    return (texts * (-(-count // len(texts))))[:count]


def clock() -> float:
    """Wall seconds, when the device has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def report(what: str, seconds: dict[str, list[float]], ours: str, **more: Any) -> None:
    """One line: medians, and how many times each peer's time is ours."""
    row = {"what": what, "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()}}
    for name, values in seconds.items():
        if name != ours:
            ratios = [theirs / own for theirs, own in zip(values, seconds[ours], strict=True)]
            row[f"{name} / {ours}"] = [
                round(value, 2) for value in (min(ratios), statistics.median(ratios), max(ratios))
            ]
    print(json.dumps({**row, **more}), flush=True)


def search(arguments: argparse.Namespace) -> None:
    """Top k of all documents for every query."""
    from sentence_transformers.util import semantic_search

    query, matrix, _ = problem(arguments.queries, arguments.documents)

    def peer() -> np.ndarray:
        left, right = torch.from_numpy(query).cuda(), torch.from_numpy(matrix).cuda()
        found = semantic_search(left, right, top_k=arguments.k, query_chunk_size=1000)
        return np.array([[item["corpus_id"] for item in row] for row in found])

    variants: dict[str, Callable[[], Any]] = {
        "ours": lambda: search_vectors(query, matrix, arguments.k, device="cuda")[0],
        "sentence-transformers": peer,
    }
    seconds, results = interleaved(variants, arguments.rounds, clock)
    exact = truth(query[:64], matrix, arguments.k)
    shares = {name: overlap(found[:64], exact) for name, found in results.items()}
    shape = {"queries": arguments.queries, "documents": arguments.documents, "k": arguments.k}
    report("search", seconds, "ours", **shape, overlap_with_fp64=shares)


def model_folder(shape: str, folder: Path, texts: list[str]) -> Path:
    """A sentence-transformers folder of random weights."""
    from sentence_transformers import SentenceTransformer, models
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(texts[:2000], vocab_size=4000, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    if shape == "MiniLM":
        config = BertConfig(
            vocab_size=4000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        model = BertModel(config)
    else:
        decoder = Qwen3Config(
            vocab_size=4000, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
            head_dim=128, intermediate_size=3072,
        )  # fmt: skip
        model = Qwen3Model(decoder)
    inner = folder / "inner"
    model.save_pretrained(inner)
    tokenizer.save_pretrained(inner)
    transformer = models.Transformer(str(inner), max_seq_length=512)
    pooling = models.Pooling(transformer.get_embedding_dimension(), "mean")
    SentenceTransformer(modules=[transformer, pooling, models.Normalize()]).save(str(folder / "whole"))
    return folder / "whole"


def encode(shape: str, texts: list[str], rounds: int) -> None:
    """Texts per second in bf16, ours packed and the peer padded."""
    from sentence_transformers import SentenceTransformer

    with tempfile.TemporaryDirectory() as name:
        folder = str(model_folder(shape, Path(name), texts))
        peer = SentenceTransformer(folder, device="cuda", model_kwargs={"dtype": torch.bfloat16})
        full = SentenceTransformer(folder, device="cuda")
        ours = open_encoder(PretrainedModel(name=folder), None, "bf16", token_budget=65536, device="cuda")
        blank = [""] * len(texts)
        variants: dict[str, Callable[[], Any]] = {
            "ours bf16": lambda: ours.encode(texts, blank),
            "sentence-transformers bf16": lambda: peer.encode(texts, batch_size=128, show_progress_bar=False),
            "sentence-transformers fp32": lambda: full.encode(texts, batch_size=128, show_progress_bar=False),
        }
        seconds, results = interleaved(variants, rounds, clock)
    tokens = sum(len(row) for row in full.tokenizer(texts, truncation=True, max_length=512)["input_ids"])
    exact = np.asarray(results["sentence-transformers fp32"], dtype=np.float32)
    cosines = {
        name: float((np.asarray(found, np.float32) * exact).sum(axis=1).min()) for name, found in results.items()
    }
    rate = tokens / statistics.median(seconds["ours bf16"])
    report(f"encode {shape}", seconds, "ours bf16", texts=len(texts), tokens=tokens, our_tokens_per_second=round(rate),
           smallest_cosine_to_fp32=cosines)  # fmt: skip


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--texts", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("search", "encode"))
    arguments = parser.parse_args()
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    if arguments.only != "encode":
        search(arguments)
    if arguments.only != "search":
        texts = code_texts(arguments.texts)
        for shape in ("MiniLM", "decoder"):
            encode(shape, texts if shape == "MiniLM" else texts[: len(texts) // 4], arguments.rounds)


if __name__ == "__main__":
    main()
