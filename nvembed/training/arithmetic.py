"""Derived numbers of a training run, without torch, for plans too: slices, learning rate, DeepSpeed configuration."""

from __future__ import annotations

import math
from typing import Any

from nvembed.training.config import DeepSpeedEngineConfig, OptimiserConfig

# Slices of a full chunk. On the quickstart's texts: padding 38 % -> 8 % of the tokens, CPU time nearly halved.
SLICES = 16
# Tokens; a smaller forward costs more than the padding it saves. On a GPU the launches cost most.
MIN_SLICE = {"cpu": 512, "cuda": 8192}


def slice_budget(token_budget: int, zero_stage: int, device_type: str) -> int:
    """Tokens of a slice; under ZeRO 3, where every forward gathers the weights again, a chunk is one slice."""
    least = MIN_SLICE.get(device_type, token_budget)
    return token_budget if zero_stage == 3 else min(token_budget, max(least, token_budget // SLICES))


def learning_rate_factor(step: int, num_steps: int, config: OptimiserConfig) -> float:
    """Share of the peak learning rate at optimiser step `step` (0-based).

    Warm-up rises linearly and reaches the peak at step `warmup_steps` - 1; from there the rate falls towards
    `final_share`, which it would reach at step `num_steps`, so no step is wasted on a rate of 0.

    Returns:
        Between 0 (exclusive, for final_share 0 too) and 1.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    falling = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_share + (1.0 - config.final_share) * falling


MAX_BUCKET = 50_000_000  # elements; DeepSpeed's default of 5e8 allocates 2 GB per rank whatever the model's size
BUCKET_MULTIPLE = 64  # DeepSpeed asserts that buckets keep NCCL's start alignment
PERSISTENT_SHARE = 1000  # ZeRO-3 keeps parameters whole that are smaller than this share of the model (at most 1e5)


def deepspeed_config(
    engine: DeepSpeedEngineConfig, optimiser: OptimiserConfig, *, trained: int, whole: int
) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`.

    Args:
        engine: the recipe's section.
        optimiser: the recipe's section.
        trained: trained parameters, objective included.
        whole: all parameters, objective included.
    """
    stage = engine.zero_stage
    bucket = -(-min(MAX_BUCKET, trained) // BUCKET_MULTIPLE) * BUCKET_MULTIPLE
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = min(MAX_BUCKET, whole)
        zero["stage3_param_persistence_threshold"] = min(100_000, whole // PERSISTENT_SHARE)
    if engine.offload_optimizer and stage > 0:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        # Batches are divided by us; DeepSpeed only wants its identity to hold: 1 x 1 x world size.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimiser.clip_norm if stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
