"""The learning rate is a pure function of the step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.training.arithmetic import learning_rate_factor
from nvembed.training.config import OptimiserConfig


@given(
    num_steps=st.integers(1, 400),
    warmup=st.integers(0, 450),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
    final=st.floats(0, 1),
)
def test_rises_to_the_peak_then_never_rises_and_stays_above_the_final_share(num_steps, warmup, schedule, final) -> None:
    config = OptimiserConfig(warmup_steps=warmup, schedule=schedule, final_share=final)
    factors = [learning_rate_factor(step, num_steps, config) for step in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(factor >= final - 1e-12 for factor in falling)
    if warmup < num_steps:
        assert factors[warmup] == 1.0
        assert warmup == 0 or factors[warmup - 1] == 1.0


def test_values() -> None:
    linear = OptimiserConfig(warmup_steps=2, schedule="linear")
    assert [learning_rate_factor(s, 6, linear) for s in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = OptimiserConfig(schedule="cosine", final_share=0.2)
    expected = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * s / 4)) for s in range(4)]
    assert [learning_rate_factor(s, 4, cosine) for s in range(4)] == pytest.approx(expected)
