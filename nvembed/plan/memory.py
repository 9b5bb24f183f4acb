"""Memory of one rank by part, in bytes.

The parts are counted from what the code keeps; a few factors are fitted to real workers on CPUs, as the growth of a
worker over its size before the model was loaded (`tests/training/test_memory_plan.py`). Valid for the first steps of
decoders of the llama family of 20-60 M parameters, float32 or bf16 autocast, SDPA. Not in it: a heap that fragments
over many steps of texts of different lengths (the quickstart's run as a whole peaks at 8.6 GiB, where two workers are
planned at 3.9 beside the driver and Ray). On GPUs memory was not compared with this: the benchmark of one H100
(`tests/benchmarks/gpu_training.py`) prints its peak, but no plan was compared with it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from nvembed.modeling.config import LatentAttentionConfig, LoraConfig
from nvembed.plan.hardware import Hardware
from nvembed.plan.sizes import StageSizes
from nvembed.training.arithmetic import MAX_BUCKET, deepspeed_config, slice_budget

GIB = 2**30
PROCESS_BYTES = 0.55 * GIB  # a worker with torch, transformers, ray and deepspeed loaded and used once
CUDA_BYTES = 1.5 * GIB  # CUDA context, cuBLAS and NCCL buffers of a rank: assumed
# What the allocator holds over what lives, for blocks that come and go with every slice. Measured: 1.17-1.34 where a
# chunk goes in four slices, 0.92 where it goes in one (ZeRO-3).
FRAGMENTED, IN_ONE_PIECE = 1.25, 1.0
# Layers of one slice that the running backward holds besides what is counted; PEFT's dropout makes many copies.
TRANSIENT_FULL, TRANSIENT_LORA = 1.0, 4.5
BASE_BYTES = 25 * 2**20  # small things of every engine
LIVE_PARAMETERS = 1_000_000_000  # ZeRO-3 keeps at most this many gathered (DeepSpeed's stage3_max_live_parameters)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        process: the interpreter with its libraries, or the CUDA context.
        weights: float32 weights (and their bf16 copies under autocast).
        gradients: of the trained weights.
        optimiser: float32 masters (DeepSpeed) and moments.
        activations: what lives for the backward of one chunk.
        buffers: DeepSpeed's flat buffers, gathered weights, temporaries of the update.
    """

    process: float
    weights: float
    gradients: float
    optimiser: float
    activations: float
    buffers: float

    @property
    def growth(self) -> float:
        """All parts without the process itself, which is what a measurement of a stage shows."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.buffers

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.process + self.growth

    def as_dict(self) -> dict[str, float]:
        """Parts and total."""
        return {**asdict(self), "total": self.total}


def stage_memory(
    stage: StageSizes, *, precision: str = "fp32", kind: str = "cpu", length: float | None = None
) -> Memory:
    """Peak of one rank.

    Args:
        stage: its sizes; the model must be known.
        precision: resolved, "fp32" or "bf16".
        kind: "cpu" or "gpu" (then without the host's memory).
        length: tokens of every text; the most by default.
    """
    whole, trained = stage.whole, stage.trained
    assert whole is not None and trained is not None
    train = stage.train
    zero = train.engine.zero_stage if train.engine.type == "deepspeed" else -1
    part = trained / stage.workers if zero >= 1 else float(trained)
    moments = 8.0 * part if train.optimiser.type == "adamw" else 0.0
    masters = 4.0 * part if zero >= 1 else 0.0
    offloaded = kind == "gpu" and zero >= 1 and train.engine.type == "deepspeed" and train.engine.offload_optimizer
    weights = 4.0 * (whole / stage.workers if zero == 3 else whole)
    own_gradients = zero == 3 or (zero == 2 and stage.chunks_per_rank(length) == 1)  # several backwards: whole, locally
    return Memory(
        process=CUDA_BYTES if kind == "gpu" else PROCESS_BYTES,
        weights=weights + _bf16_copies(stage, precision, kind, length),
        gradients=4.0 * (part if own_gradients else trained),
        optimiser=0.0 if offloaded else moments + masters,
        activations=activation_bytes(stage, precision, kind, length),
        buffers=BASE_BYTES + _buffers(stage, zero, whole, trained),
    )


def _buffers(stage: StageSizes, zero: int, whole: int, trained: int) -> float:
    """DeepSpeed's bucket, the copies it sends and makes of its part, ZeRO-3's gathered weights and their flat copy."""
    engine = stage.train.engine
    if engine.type != "deepspeed":
        return 0.0
    config = deepspeed_config(engine, stage.train.optimiser, trained=trained, whole=whole)
    bucket = 4.0 * min(trained, config["zero_optimization"]["reduce_bucket_size"])
    gathered = 4.0 * (min(whole, LIVE_PARAMETERS) + min(whole, MAX_BUCKET)) if zero == 3 else 0.0
    return {0: 1.0, 1: 3.0, 2: 2.5, 3: 2.5}[zero] * bucket + gathered


def slice_tokens(stage: StageSizes, length: float | None = None, kind: str = "cpu") -> float:
    """Tokens of one forward."""
    engine = stage.train.engine
    zero = engine.zero_stage if engine.type == "deepspeed" else 0
    device_type = "cuda" if kind == "gpu" else "cpu"
    return min(slice_budget(stage.train.token_budget, zero, device_type), stage.chunk_tokens(length))


def _bf16_copies(stage: StageSizes, precision: str, kind: str, length: float | None) -> float:
    """Copies of matrices that autocast makes: one of a trained matrix, one for every slice of a frozen one."""
    if precision == "fp32":
        return 0.0
    assert stage.model is not None
    shape = stage.model.shape
    matrices = shape.layers * sum(inputs * outputs for inputs, outputs in shape.linears.values())
    copies = 1.0
    if stage.train.engine.gradient_checkpointing:
        copies = 1.0 / shape.layers  # those of the layer that is computed again
    elif isinstance(stage.train.adapter, LoraConfig):
        copies = -(-stage.chunk_tokens(length) // slice_tokens(stage, length, kind))
    return 2.0 * (copies * matrices + stage.model.head + stage.lora)


def activation_bytes(stage: StageSizes, precision: str, kind: str = "cpu", length: float | None = None) -> float:
    """Bytes that live for the backward of one chunk, and of the layer whose backward is running."""
    assert stage.model is not None
    shape, tokens = stage.model.shape, stage.chunk_tokens(length)
    layer, once = layer_bytes(stage, precision, kind), slice_tokens(stage, length, kind)
    ends = 4.0 * 5 * shape.hidden + head_bytes(stage, precision)
    running = (TRANSIENT_LORA if isinstance(stage.train.adapter, LoraConfig) else TRANSIENT_FULL) * once * layer
    if stage.train.engine.gradient_checkpointing:
        return FRAGMENTED * tokens * (4.0 * shape.hidden * shape.layers + ends) + 2.0 * tokens * layer
    allocated = FRAGMENTED if once < tokens else IN_ONE_PIECE
    return allocated * tokens * (shape.layers * layer + ends) + running


def layer_bytes(stage: StageSizes, precision: str, kind: str = "cpu") -> float:
    """Bytes one token leaves behind in one layer: inputs of the two norms, of the linear maps, of SDPA, of the gate.

    Under autocast the norms stay in float32 and every linear map has a bf16 copy of its input of its own. With LoRA the
    frozen maps keep nothing, each adapter its own dropped input and (on a CPU in float32) the noise.
    """
    assert stage.model is not None
    shape, adapter = stage.model.shape, stage.train.adapter
    hidden, wide, query = shape.hidden, shape.intermediate, shape.heads * shape.head_dim
    size = 4 if precision == "fp32" else 2
    attention = size * 2 * (query + shape.kv_heads * shape.head_dim)  # query, key, value, and what SDPA gives
    gate = 3 * size * wide
    if not isinstance(adapter, LoraConfig):
        norms, inputs = (4 * 4, 2 * 4) if precision == "fp32" else (4 * 4, 5 * 2)
        return float((norms + inputs) * hidden + attention + gate + size * wide)
    widths = {"o_proj": query, "down_proj": wide}
    adapted = [widths.get(name, hidden) for name in adapter.target_modules]
    if adapter.dropout == 0 and precision == "fp32":  # adapters share their input, and o_proj's is what SDPA gives
        return float(2 * 4 * hidden + attention + gate + size * (2 * hidden + wide))
    noise = 0 if adapter.dropout == 0 else 4 if kind == "cpu" else 1
    return float(2 * 4 * hidden + attention + gate + (size + noise) * sum(adapted))


def head_bytes(stage: StageSizes, precision: str) -> float:
    """Bytes one token leaves behind in the latent attention head."""
    assert stage.model is not None
    head, hidden = stage.model.pooling, stage.model.shape.hidden
    if not isinstance(head, LatentAttentionConfig):
        return 0.0
    inner = head.num_heads * (head.head_dim or hidden // head.num_heads)
    size = 4 if precision == "fp32" else 2
    return float(4 * 2 * hidden + size * (2 * hidden + 2 * inner + 4 * head.mlp_ratio * hidden))


def fits(memory: Memory, ranks: int, hardware: Hardware) -> bool:
    """Whether the ranks have room on a machine: one per device, or all in the memory of a machine without GPUs."""
    if hardware.kind == "cpu":
        return memory.total * ranks <= hardware.memory_gib * GIB
    return memory.total <= hardware.memory_gib * GIB
