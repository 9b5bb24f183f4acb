"""Floating point operations, seconds and storage of a stage."""

from __future__ import annotations

from nvembed.modeling.config import LatentAttentionConfig
from nvembed.plan.hardware import Hardware
from nvembed.plan.memory import GIB, slice_tokens
from nvembed.plan.sizes import Model, StageSizes

CHECKPOINT_KINDS = {"adamw": 3, "sgd": 1}  # tensors per trained parameter: masters, and two moments
# Kernels of a training forward of one layer: from 0.244 s a slice whatever its tokens, 28 layers, two forwards and a
# backward, 21 us each, on an H100 (LoRA on seven maps; full fine-tuning has fewer).
LAUNCHES = 104
TOKEN_BYTES = 4.0  # of a training stream: the quickstart's shards take 4.0 bytes a token, ids and columns included


def forward_flops(model: Model, tokens: float, length: float) -> float:
    """Operations of one forward: 2 per weight and token, and the attention's two products over `length` tokens.

    The latents' own keys and values, computed once per forward whatever its texts, are left out.
    """
    shape = model.shape
    weights = float(shape.parameters - shape.embedding_parameters)
    attention = 4.0 * shape.layers * length * shape.heads * shape.head_dim
    pooling = 0.0
    if isinstance(model.pooling, LatentAttentionConfig):
        head = model.pooling
        inner = head.num_heads * (head.head_dim or shape.hidden // head.num_heads)
        maps = 2 * shape.hidden * inner + 3 * head.mlp_ratio * shape.hidden**2
        pooling = 2.0 * maps + 4.0 * head.num_latents * inner
    return tokens * (2.0 * weights + attention + pooling)


def stage_tokens(stage: StageSizes, length: float) -> float:
    """Tokens of the whole stage when a text has `length` on average."""
    return stage.steps * stage.texts * length


def stage_flops(stage: StageSizes, length: float) -> float:
    """Floating-point operations of a training stage.

    Per batch: a forward, the gradient of the states (as much again), and the gradient of the trained share of the
    weights. A batch in several chunks (gradient cache) costs one more forward, gradient checkpointing another.
    """
    assert stage.model is not None and stage.trained is not None
    forward = forward_flops(stage.model, stage_tokens(stage, length), length)
    dense = stage.model.parameters - stage.model.shape.embedding_parameters
    share = min(1.0, stage.trained / dense)
    passes = 2.0 + share + (stage.chunks_per_rank(length) > 1) + stage.train.engine.gradient_checkpointing
    return forward * passes


def training_devices(workers: int, threads: int, hardware: Hardware) -> int:
    """Devices that train at once: one per rank; of a CPU the cores that the ranks' threads take."""
    return min(workers * (threads if hardware.kind == "cpu" else 1), hardware.devices)


def peak_share(width: int, hardware: Hardware) -> float:
    """Share of the peak that arithmetic reaches in a model of that width."""
    return hardware.mfu * min(1.0, width / (hardware.full_width or 1)) if hardware.full_width else hardware.mfu


def compute_seconds(flops: float, devices: float, width: int, hardware: Hardware) -> float:
    """Seconds of the arithmetic of a model of that width on so many devices."""
    return flops / (devices * hardware.peak_tflops * 1e12 * peak_share(width, hardware))


def launch_seconds(stage: StageSizes, hardware: Hardware, length: float) -> float:
    """Seconds that a GPU waits for its kernels' launches, all optimiser steps together; 0 on a CPU.

    A forward counts once, a backward twice, for every layer and slice (`LAUNCHES` says what was measured).
    """
    assert stage.model is not None
    chunks = stage.chunks_per_rank(length)
    slices = chunks * -(-stage.chunk_tokens(length) // slice_tokens(stage, length, hardware.kind))
    passes = 3 + (chunks > 1) + stage.train.engine.gradient_checkpointing
    return stage.steps * slices * passes * stage.model.shape.layers * LAUNCHES * hardware.launch_seconds


def update_seconds(stage: StageSizes, hardware: Hardware) -> float:
    """Seconds of all optimiser updates and gradient exchanges: bytes over the memory's and the link's bandwidth.

    An update reads and writes weight, gradient and two moments (about 10 times the trained parameters' bytes, the
    temporaries included); an exchange moves about twice the trained parameters' bytes.
    """
    assert stage.trained is not None
    size = 4.0 * stage.trained
    zero = stage.train.engine.zero_stage if stage.train.engine.type == "deepspeed" else 0
    own = size / stage.workers if zero else size
    exchange = 0.0 if stage.workers == 1 else 2.0 * size / (hardware.link_gb_s * 1e9)
    return stage.steps * (10.0 * own / (hardware.bandwidth_gb_s * 1e9) + exchange)


def stage_storage(stage: StageSizes, length: float) -> dict[str, float]:
    """Bytes of a stage's stream and model folder, and of its checkpoints while it runs."""
    assert stage.model is not None and stage.trained is not None
    one = 4.0 * stage.trained * CHECKPOINT_KINDS[stage.train.optimiser.type]
    return {
        "stream": TOKEN_BYTES * stage_tokens(stage, length),
        "checkpoints": one * (min(stage.train.keep_checkpoints, -(-stage.steps // stage.train.checkpoint_every)) + 1),
        "model": 4.0 * stage.model.parameters,
    }


def flops_text(flops: float) -> str:
    """Operations for people: `42.3 TFLOP`, `365.3 EFLOP`."""
    for name in ("G", "T", "P", "E", "Z"):
        flops /= 1e9 if name == "G" else 1e3
        if flops < 1000:
            break
    return f"{flops:,.1f} {name}FLOP"


def size_text(size: float) -> str:
    """Bytes for people: `4.2 MiB`, `1.4 TiB`."""
    for name, unit in (("PiB", GIB * 2**20), ("TiB", GIB * 2**10), ("GiB", GIB)):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 2**20:,.1f} MiB"


def time_text(seconds: float) -> str:
    """Seconds for people: `7.5 h`, `5:17`, `25 s`."""
    if seconds >= 7_200:
        return f"{seconds / 3600:,.1f} h"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
