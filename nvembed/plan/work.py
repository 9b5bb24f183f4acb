"""Floating point operations, seconds and storage of a stage."""

from __future__ import annotations

from nvembed.modeling.config import LatentAttentionConfig
from nvembed.plan.hardware import Hardware
from nvembed.plan.sizes import Model, StageSizes

CHECKPOINT_KINDS = {"adamw": 3, "sgd": 1}  # tensors per trained parameter: masters, and two moments
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
    """Operations of a stage: a forward, the gradient of the states (as much), the gradient of the trained share of
    the weights; one forward more where the batch is cut into chunks (gradient cache), and one more with gradient
    checkpointing."""
    assert stage.model is not None and stage.trained is not None
    forward = forward_flops(stage.model, stage_tokens(stage, length), length)
    dense = stage.model.parameters - stage.model.shape.embedding_parameters
    share = min(1.0, stage.trained / dense)
    passes = 2.0 + share + (stage.chunks_per_rank(length) > 1) + stage.train.engine.gradient_checkpointing
    return forward * passes


def compute_seconds(flops: float, ranks: int, hardware: Hardware) -> float:
    """Seconds of the arithmetic on that many ranks, at most one per device."""
    return flops / (min(ranks, hardware.devices) * hardware.peak_tflops * 1e12 * hardware.mfu)


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
    """Bytes a stage leaves on storage, and what its checkpoints take while it runs."""
    assert stage.model is not None and stage.trained is not None
    one = 4.0 * stage.trained * CHECKPOINT_KINDS[stage.train.optimiser.type]
    return {
        "stream": TOKEN_BYTES * stage_tokens(stage, length),
        "checkpoints": one * (min(stage.train.keep_checkpoints, -(-stage.steps // stage.train.checkpoint_every)) + 1),
        "model": 4.0 * stage.model.parameters,
    }
