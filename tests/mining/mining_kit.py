"""The `mine` step in this process, on made-up vectors: a small data set, an encoder and a pool for `mine_step`.

Texts are real, vectors a hash of the words, so that texts with shared words are near: what an embedder does is not the
subject of tests that use this. A model is named by `retriever("other")`.
"""

import json
from pathlib import Path

import numpy as np
import xxhash
from artifacts import PreparedSet, publish_prepared

from nvembed.core import storage
from nvembed.core.parquet import list_shards, read_table
from nvembed.core.vectors import vector_table, write_shard
from nvembed.data.tables import Document
from nvembed.mining.config import MineConfig
from nvembed.mining.step import mine_step
from nvembed.retrieval.config import EncodeConfig
from nvembed.retrieval.encode import EncodeReport
from nvembed.types import ScoredId, TaskType, TrainingExample

PLACES = ["heap", "stack", "kernel", "browser", "server", "parser", "driver", "socket"]
FAULTS = ["overflow", "leak", "race", "injection", "traversal"]
TEXTS = [
    f"a {fault} in the {place} of the {FAULTS[(n + m) % 5]} {place}"
    for n, place in enumerate(PLACES)
    for m, fault in enumerate(FAULTS)
]
CONFIG = MineConfig(num_negatives=3, depth=10, encode=EncodeConfig(actors=2, shard_rows=5))


def retriever(name):
    """A model that the encoder below makes up."""
    return {"type": "pretrained", "name": name}


def vectors(texts, salt):
    words = {}
    out = np.zeros((len(texts), 24), dtype=np.float32)
    for row, text in enumerate(texts):
        for word in text.casefold().split():
            seed = xxhash.xxh3_64_intdigest(f"{salt} {word}".encode())
            out[row] += words.setdefault(word, np.random.default_rng(seed).standard_normal(24))
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def pool(factory, arguments, tasks, **_):
    """`run_pool` with two workers in this process."""
    workers = [factory(**arguments), factory(**arguments)]
    for number, task in enumerate(tasks):
        yield {**workers[number % 2].work(json.loads(json.dumps(task))), "worker": str(number % 2)}


def encode(source, model, out, config, may_reject=()):
    """`encode_shards` with made-up vectors, text shard by text shard."""
    for name in list_shards(source):
        table = read_table(f"{source}/{name}", ["key", "text"])
        salt = model.package if hasattr(model, "package") else Path(model.name).name
        matrix = vectors(table.column("text").to_pylist(), salt)
        write_shard(vector_table(table.column("key"), matrix), f"{out}/{name}")
    return EncodeReport()


MINE = mine_step(encode, pool)


def prepare(uri):
    """A retrieval set of 42 documents and 41 queries as `<uri>/prepare`."""
    documents = [Document(f"d{number:02d}", "", text) for number, text in enumerate(TEXTS)]
    documents += [Document("near", "", f"{TEXTS[0]} again"), Document("copy", "", TEXTS[1].upper())]
    examples = [
        TrainingExample(
            f"q{number:02d}", "set", TaskType.RETRIEVAL, f"{text} found today", (ScoredId(f"d{number:02d}"),)
        )
        for number, text in enumerate(TEXTS)
    ]
    examples.append(TrainingExample("far", "set", TaskType.RETRIEVAL, "race in the kernel", (ScoredId("d00"),)))

    sets = {"set": PreparedSet(TaskType.RETRIEVAL, documents, examples, prompt="")}
    return publish_prepared(storage.join(uri, "prepare"), sets)


def mine(prepared, out, **changes):
    """(artifact, mined rows by example, the data set's part of the audit)."""
    artifact = MINE.run(MineConfig.model_validate({**CONFIG.model_dump(), **changes}), {"prepare": prepared}, str(out))
    rows = read_table(artifact.path("set", "mined.parquet")).to_pylist()
    audit = json.loads((out / "audit.json").read_text())["datasets"]["set"]
    return artifact, {row["example_id"]: row for row in rows}, audit
