"""The torch engine alone: its steps against AdamW written out, whole tensors in and out.

Two ranks against one process: test_equality.py.
"""

from __future__ import annotations

import pytest
import torch
from training_kit import CPU, MemoryStream, tiny_model

from nvembed.training.chunked import backward_global_batch
from nvembed.training.config import OptimiserConfig, TorchEngineConfig, TrainConfig
from nvembed.training.engine import Engine, build_engine
from nvembed.training.engine_torch import TorchEngine
from nvembed.training.sharding import shard

CONFIG = TrainConfig(
    engine=TorchEngineConfig(),
    optimiser=OptimiserConfig(learning_rate=1e-3, head_learning_rate=3e-3, weight_decay=0.1, eps=1e-5, clip_norm=0.5),
    precision="fp32",
)


def made() -> Engine:
    return build_engine(tiny_model(CONFIG), CONFIG.optimiser, CONFIG.engine, CPU)


def backward(engine: Engine, step: int) -> None:
    batch = next(MemoryStream(step + 1).batches(step))
    backward_global_batch(engine, shard(batch, 100_000, 0, 1), engine.model.embedder.tokeniser)


def test_two_steps_are_those_of_adamw_with_clipping() -> None:
    engine = made()
    assert isinstance(engine, TorchEngine)
    head, config = engine.model.head_names(), CONFIG.optimiser
    expected = {name: tensor.double() for name, tensor in engine.tensors("parameters")}
    first = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    for step, factor in ((1, 0.5), (2, 1.0)):
        backward(engine, step - 1)
        gradients = {name: tensor.double() for name, tensor in engine.gradients().items()}
        norm = torch.cat([tensor.flatten() for tensor in gradients.values()]).norm()
        assert norm > config.clip_norm
        assert engine.step(factor) == pytest.approx(float(norm), rel=1e-5)
        for name, tensor in gradients.items():
            clipped = tensor * config.clip_norm / norm
            rate = factor * (3e-3 if name in head else 1e-3)
            decay = 0.1 if tensor.ndim > 1 else 0.0
            first[name] = 0.9 * first[name] + 0.1 * clipped
            second[name] = 0.999 * second[name] + 0.001 * clipped**2
            update = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.999**step)).sqrt() + config.eps)
            expected[name] = expected[name] * (1 - rate * decay) - rate * update
    assert head and head < set(expected)
    for kind, tensors in (("parameters", expected), ("exp_avg", first), ("exp_avg_sq", second)):
        for name, tensor in engine.tensors(kind):
            torch.testing.assert_close(tensor, tensors[name].float(), rtol=1e-4, atol=1e-7)


def test_moments_are_zero_before_the_first_step_and_can_be_loaded() -> None:
    engine, other = made(), made()
    assert all(float(tensor.abs().sum()) == 0 for _, tensor in engine.tensors("exp_avg"))
    for step in range(2):
        backward(engine, step)
        engine.step(1.0)
    moments = {(kind, name): tensor for kind in engine.moments for name, tensor in engine.tensors(kind)}
    weights = dict(engine.tensors("parameters"))
    with torch.no_grad():
        for name, parameter in other.model.trainable():
            parameter.copy_(weights[name])
    other.load_moments(lambda kind, name: moments[kind, name], 2)
    for each in (engine, other):
        backward(each, 2)
        each.step(1.0)
    continued = dict(other.tensors("parameters"))
    assert all(torch.equal(tensor, continued[name]) for name, tensor in engine.tensors("parameters"))


def test_no_backward_after_the_gradients_were_read() -> None:
    engine = made()
    backward(engine, 0)
    engine.gradients()
    with pytest.raises(AssertionError, match="step first"):
        backward(engine, 1)
