"""Configuration of one training stage."""

from typing import Annotated, Literal

from pydantic import Field

from nvembed.losses.config import ContrastiveConfig, ObjectiveConfig
from nvembed.modeling.config import AdapterConfig, FullConfig
from nvembed.types import Config


class OptimiserConfig(Config):
    """AdamW with a warm-up and a linear or cosine decay to `final_share` of the peak."""

    type: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(2e-5, gt=0)
    head_learning_rate: float | None = Field(None, gt=0, description="Pooling and objective; null: learning_rate.")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    final_share: float = Field(0.0, ge=0, le=1)
    clip_norm: float = Field(1.0, gt=0)


class DeepSpeedEngineConfig(Config):
    """DeepSpeed ZeRO on any number of ranks."""

    type: Literal["deepspeed"] = "deepspeed"
    zero_stage: int = Field(2, ge=0, le=3)
    offload_optimizer: bool = False
    gradient_checkpointing: bool = False


class TorchEngineConfig(Config):
    """Plain torch, the reference: one process, or replicated ranks whose gradients are averaged."""

    type: Literal["torch"] = "torch"
    gradient_checkpointing: bool = False


EngineConfig = Annotated[DeepSpeedEngineConfig | TorchEngineConfig, Field(discriminator="type")]


class TrainConfig(Config):
    """One stage of training, teacher or student. Steps and global batch size belong to the stream."""

    objective: ObjectiveConfig = ContrastiveConfig()
    adapter: AdapterConfig = FullConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    engine: EngineConfig = DeepSpeedEngineConfig()
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the processor has it.")
    num_workers: int = Field(2, ge=1)
    threads_per_worker: int = Field(1, ge=1)
    gpus_per_worker: float = Field(0.0, ge=0)
    token_budget: int = Field(8192, ge=8, description="Tokens of one chunk, padding included.")
    checkpoint_every: int = Field(20, ge=1, description="Optimiser steps.")
    keep_checkpoints: int = Field(2, ge=1)
    max_failures: int = Field(
        2, ge=0, description="Worker failures after which the run restarts from the newest checkpoint."
    )
    seed: int = 0
