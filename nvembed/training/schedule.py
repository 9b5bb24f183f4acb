"""Learning rate as a pure function of the optimiser step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from nvembed.training.config import OptimiserConfig


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
