"""The engine interface of the training loop.

Two engines implement it: DeepSpeed ZeRO 0-3, and plain torch, the reference that every ZeRO path is tested equal to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from nvembed.training.config import EngineConfig, OptimiserConfig
from nvembed.training.model import Mode, TrainedModel

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


class Engine(ABC):
    """Forward, backward, optimiser step, and whole tensors in and out.

    Every method is collective: all ranks call it, in the same order.

    Attributes:
        model: the root module. Its parameters may be partitioned; only `forward` gathers them.
        device: device of the inputs.
        moments: names of the optimiser's per-parameter tensors.
    """

    def __init__(self, model: TrainedModel, optimiser: OptimiserConfig, config: EngineConfig, device: torch.device):
        self.model = model
        self.device = device
        self.config = config
        self.optimiser_config = optimiser
        self.moments = MOMENTS[optimiser.type]

    @abstractmethod
    def forward(self, mode: Mode, **arguments: Any) -> torch.Tensor:
        """`TrainedModel.forward` with parameters gathered where needed."""

    @abstractmethod
    def backward(self, scalar: torch.Tensor) -> None:
        """Add the gradient of a scalar that came from `forward`. More than one needs `multi_backward`."""

    @abstractmethod
    def multi_backward(self) -> AbstractContextManager[None]:
        """Inside, `backward` may be called several times for one optimiser step; gradients are reduced at the end."""

    @abstractmethod
    def step(self, factor: float) -> float:
        """Clip, update the weights, forget the gradients.

        Args:
            factor: share of each parameter group's peak learning rate.

        Returns:
            Global L2 norm of the rank-averaged gradient before clipping. When it is not finite, the weights may or
            may not have been changed.
        """

    @abstractmethod
    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole rank-averaged gradients by name, between the (last) backward and `step`."""

    @abstractmethod
    def tensors(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole float32 tensors on the CPU, by name in module order.

        Args:
            kind: `parameters` (the masters) or one of `moments` (zeros before the first step).
        """

    @abstractmethod
    def load_moments(self, read: Callable[[str, str], torch.Tensor], steps: int) -> None:
        """Continue an optimiser.

        Args:
            read: (kind, name) -> whole tensor.
            steps: optimiser steps already taken (AdamW's bias correction).
        """


def optimiser_groups(model: TrainedModel, config: OptimiserConfig) -> list[dict[str, Any]]:
    """Parameter groups: {backbone, head} x {decayed, not decayed}, empty ones left out.

    Vectors and scalars (biases, norms, the temperature) are not decayed. The rate of a group is its `peak` times the
    schedule's factor; it starts at 0, so that nothing an engine does while it sets up can change a weight.
    """
    head = model.head_names()
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.trainable():
        is_head, decayed = name in head, parameter.ndim > 1
        peak = config.learning_rate if not is_head else config.head_learning_rate or config.learning_rate
        empty = {"params": [], "lr": 0.0, "peak": peak, "weight_decay": config.weight_decay if decayed else 0.0}
        groups.setdefault((is_head, decayed), empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimiser(model: TrainedModel, config: OptimiserConfig) -> torch.optim.Optimizer:
    """The torch optimiser over `optimiser_groups`."""
    groups = optimiser_groups(model, config)
    if config.type == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps)


def set_learning_rate(optimiser: Any, factor: float) -> None:
    """Give every group its peak rate times `factor`."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * factor


def build_engine(model: TrainedModel, optimiser: OptimiserConfig, config: EngineConfig, device: torch.device) -> Engine:
    """The engine of a recipe's section. DeepSpeed is imported for its own engine only."""
    if config.type == "torch":
        from nvembed.training.engine_torch import TorchEngine

        return TorchEngine(model, optimiser, config, device)
    from nvembed.training.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, optimiser, config, device)
