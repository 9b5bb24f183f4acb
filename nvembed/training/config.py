"""Configuration of one training stage."""

from typing import Annotated, Literal

from pydantic import Field

from nvembed.losses.config import ContrastiveConfig, ObjectiveConfig
from nvembed.modeling.config import AdapterConfig, FullConfig
from nvembed.types import Config

_Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimiserConfig(Config):
    """AdamW with a warm-up and a linear or cosine decay to `final_share` of the peak."""

    type: Literal["adamw", "sgd"] = Field("adamw", description="Kind of the optimiser: adamw, or sgd without momentum.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate of the backbone.")
    head_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of pooling and objective; null: that of the backbone."
    )
    weight_decay: float = Field(
        0.0, ge=0, description="Weight decay of matrices; biases, norms and the temperature are not decayed."
    )
    betas: tuple[_Decay, _Decay] = Field(
        (0.9, 0.999), description="AdamW: decay rates of the first and the second moment of the gradient."
    )
    eps: float = Field(1e-8, gt=0, description="AdamW: number added to the denominator for numerical stability.")
    warmup_steps: int = Field(
        0, ge=0, description="Optimiser steps in which the learning rate rises linearly to its peak."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Course of the learning rate after the warm-up; linear and cosine fall to `final_share`."
    )
    final_share: float = Field(
        0.0, ge=0, le=1, description="Share of the peak learning rate that a linear or cosine schedule falls to."
    )
    clip_norm: float = Field(
        1.0, gt=0, description="Largest L2 norm of the whole gradient; a larger gradient is scaled down to it."
    )


class DeepSpeedEngineConfig(Config):
    """DeepSpeed ZeRO on any number of ranks."""

    type: Literal["deepspeed"] = Field("deepspeed", description="Kind of the engine.")
    zero_stage: int = Field(
        2,
        ge=0,
        le=3,
        description="Stage of DeepSpeed ZeRO: divided over ranks are 0 nothing, 1 optimiser state, 2 also "
        "gradients, 3 also parameters.",
    )
    offload_optimizer: bool = Field(
        False, description="Keep the optimiser state in CPU memory (ZeRO-Offload); without effect at zero_stage 0."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute the backbone's activations in the backward pass: less memory, one more forward."
    )


class TorchEngineConfig(Config):
    """Plain torch, the reference: one process, or replicated ranks whose gradients are averaged."""

    type: Literal["torch"] = Field("torch", description="Kind of the engine.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute the backbone's activations in the backward pass: less memory, one more forward."
    )


EngineConfig = Annotated[DeepSpeedEngineConfig | TorchEngineConfig, Field(discriminator="type")]


class TrainConfig(Config):
    """One stage of training, teacher or student. Steps and global batch size belong to the stream."""

    objective: ObjectiveConfig = Field(
        ContrastiveConfig(), description="Training objective: contrastive for a teacher, distill for a student."
    )
    adapter: AdapterConfig = Field(
        FullConfig(),
        description="Which weights of the backbone are trained: all of them (full), or LoRA layers instead.",
    )
    optimiser: OptimiserConfig = Field(OptimiserConfig(), description="Optimiser, learning rates and their schedule.")
    engine: EngineConfig = Field(
        DeepSpeedEngineConfig(), description="Training engine: DeepSpeed ZeRO, or plain torch as its reference."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Precision of forward and backward; auto: bf16 where the processor has it, else fp32."
    )
    num_workers: int = Field(
        2, ge=1, description="Training processes (ranks), over which each global batch is divided."
    )
    threads_per_worker: int = Field(
        1, ge=1, description="CPU threads of a worker; a bit-equal resume needs the same number."
    )
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs of a worker; 0 trains on CPUs.")
    token_budget: int = Field(
        8192, ge=8, description="Most tokens of one chunk, padding included; bounds the memory of a rank."
    )
    checkpoint_every: int = Field(20, ge=1, description="Optimiser steps from one checkpoint to the next.")
    keep_checkpoints: int = Field(
        2, ge=1, description="Newest complete checkpoints that are kept; older ones are deleted."
    )
    max_failures: int = Field(
        2, ge=0, description="Worker failures after which the run restarts from the newest checkpoint."
    )
    seed: int = Field(0, ge=0, description="Seed of dropout and of LoRA's first weights.")
