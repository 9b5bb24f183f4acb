"""The DeepSpeed configuration of a stage, from numbers alone: no torch, no deepspeed, so that a plan can show it."""

from __future__ import annotations

from typing import Any

from nvembed.training.config import EngineConfig, OptimiserConfig

MAX_BUCKET = 50_000_000  # elements; DeepSpeed's default of 5e8 allocates 2 GB per rank whatever the model's size
BUCKET_MULTIPLE = 64  # DeepSpeed asserts that buckets keep NCCL's start alignment
PERSISTENT_SHARE = 1000  # ZeRO-3 keeps parameters whole that are smaller than this share of the model (at most 1e5)


def deepspeed_config(engine: EngineConfig, optimiser: OptimiserConfig, *, trained: int, whole: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

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
