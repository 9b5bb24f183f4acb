"""Training on one accelerator: tokens per second and share of the peak, by engine.

    python tests/benchmarks/gpu_training.py [--layers 28 --hidden 1024 ...] [--peak-tflops 989]

A decoder of random weights (the default has the shape of a 0.6B model, 0.44 B of it outside the embeddings) on made-up
texts: speed depends on shapes and lengths only. Prints one JSON line per measurement; every line is a median of
`--rounds` with its smallest and largest value. Training FLOPs are counted as 6 per weight outside the embeddings and
token, whatever LoRA and the gradient cache really compute, so that shares of the peak can be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nvembed.losses.objectives import build_objective
from nvembed.modeling.adapters import apply_adapter
from nvembed.modeling.assemble import build_embedder
from nvembed.modeling.backbones import load_backbone
from nvembed.modeling.config import EmbedderConfig, LatentAttentionConfig, RandomBackbone
from nvembed.modeling.embedder import Embedder
from nvembed.text.config import TextConfig
from nvembed.training.arithmetic import slice_budget
from nvembed.training.config import TrainConfig
from nvembed.training.engine import build_engine
from nvembed.training.loop import optimiser_step
from nvembed.training.model import TrainedModel
from nvembed.training.sharding import shard
from nvembed.types import Batch

WORDS = ["".join(pair) for pair in zip("abcdefghij" * 10, "klmnopqrst" * 10, strict=True)]


def make_texts(rng: np.random.Generator, words: np.ndarray) -> list[str]:
    """Texts of the given numbers of words."""
    return [" ".join(rng.choice(WORDS, int(count))) for count in words]


def embedder_of(arguments: argparse.Namespace, pooling: Any, max_length: int) -> Embedder:
    """A random decoder on the device."""
    backbone = RandomBackbone(
        family="qwen3", vocab_size=2000, hidden_size=arguments.hidden, intermediate_size=arguments.intermediate,
        num_layers=arguments.layers, num_heads=arguments.heads, num_key_value_heads=arguments.kv_heads,
    )  # fmt: skip
    corpus = make_texts(np.random.default_rng(0), np.full(200, 40))
    config = EmbedderConfig(pooling=pooling, text=TextConfig(max_length=max_length))
    return build_embedder(*load_backbone(backbone, corpus, 0), config, 0)


def weights_outside_embeddings(embedder: Embedder) -> int:
    """Weights that every token is multiplied with."""
    names = embedder.named_parameters()
    return sum(parameter.numel() for name, parameter in names if "embed_tokens" not in name)


def make_batch(embedder: Embedder, examples: int, group: int, words: int) -> Batch:
    """Queries and documents of about `words` words, a quarter of that for queries."""
    rng = np.random.default_rng(1)
    counts = np.tile([words // 4] + [words] * (group - 1), examples)
    texts = make_texts(rng, np.maximum(rng.normal(counts, counts / 4), 4).astype(int))
    ids = np.arange(examples * group).reshape(examples, group)
    return Batch(
        step=0,
        example_ids=[f"example-{i}" for i in range(examples)],
        texts=texts,
        instructions=[""] * len(texts),
        token_lengths=embedder.tokeniser.lengths(texts, [""] * len(texts)),
        present=np.ones((examples, group), bool),
        document_ids=ids.astype(np.int64),
        positive_ids=[ids[i, 1:2].astype(np.int64) for i in range(examples)],
        teacher_vectors=None,
    )


def timed(action: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each round after one that is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def say(name: str, seconds: list[float], **facts: Any) -> None:
    """One measurement as a JSON line."""
    spread = {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}
    print(json.dumps({"measured": name, **{k: round(v, 4) for k, v in spread.items()}, **facts}), flush=True)


def training(arguments: argparse.Namespace, engine: dict[str, Any], token_budget: int) -> None:
    """A whole optimiser step of stage 1: LoRA, latent attention, in-batch and hard negatives."""
    config = TrainConfig.model_validate(
        {
            "adapter": {"type": "lora", "r": 16, "alpha": 32, "dropout": 0.0},
            "optimiser": {"learning_rate": 1e-5},
            "engine": engine,
            "precision": "bf16",
            "token_budget": token_budget,
            "gpus_per_worker": 1,
        }
    )
    torch.cuda.reset_peak_memory_stats()
    embedder = embedder_of(arguments, LatentAttentionConfig(num_latents=512, num_heads=8), 512)
    weights = weights_outside_embeddings(embedder)
    apply_adapter(embedder, config.adapter)
    if config.engine.gradient_checkpointing:
        embedder.embedding_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    objective = build_objective(config.objective, dim=embedder.dim, teacher_dim=None)
    model = TrainedModel(embedder, objective, "bf16").train()
    trained = build_engine(model, config.optimiser, config.engine, torch.device("cuda"))
    batch = make_batch(embedder, arguments.examples, 2 + 1, 240)
    stage = config.engine.zero_stage if config.engine.type == "deepspeed" else 0
    sharding = shard(batch, token_budget, 0, 1, slice_budget=slice_budget(token_budget, stage, "cuda"))
    seconds = timed(lambda: optimiser_step(trained, sharding, 1.0), arguments.rounds)
    tokens = int(batch.token_lengths.sum())
    parts = [part for chunk in sharding.own_chunks for part in chunk]
    padded = sum(len(part) * int(batch.token_lengths[part].max()) for part in parts)
    rate = tokens / statistics.median(seconds)
    say(
        f"train {engine['type']} ZeRO-{stage}" + (" checkpointing" if engine.get("gradient_checkpointing") else ""),
        seconds,
        tokens_per_second=round(rate),
        share_of_peak=round(6 * weights * rate / (arguments.peak_tflops * 1e12), 4),
        chunks=len(sharding.own_chunks),
        padded_over_real=round(padded / tokens, 4),
        weights=weights,
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2),
    )


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 28), ("hidden", 1024), ("intermediate", 3072), ("heads", 16), ("kv-heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="Dense bf16; 989 is an H100 SXM.")
    arguments = parser.parse_args()
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    training(arguments, {"type": "torch"}, 16384)
    for stage in (1, 2, 3):
        training(arguments, {"type": "deepspeed", "zero_stage": stage}, 16384)
    training(arguments, {"type": "deepspeed", "zero_stage": 2, "gradient_checkpointing": True}, 65536)


if __name__ == "__main__":
    main()
