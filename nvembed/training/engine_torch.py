"""The torch engine, reference for every ZeRO path: one process, or replicated ranks whose gradients are averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from nvembed.core.distributed import world_size
from nvembed.training.config import OptimiserConfig, TorchEngineConfig
from nvembed.training.engine import Engine, build_optimiser, set_learning_rate
from nvembed.training.model import Mode, TrainedModel


class TorchEngine(Engine):
    """`Engine` over plain torch. Gradients stay on the parameters; the first `gradients` or `step` averages them."""

    def __init__(
        self, model: TrainedModel, optimiser: OptimiserConfig, config: TorchEngineConfig, device: torch.device
    ):
        super().__init__(model.to(device), optimiser, config, device)
        self.optimiser = build_optimiser(model, optimiser)
        self._averaged = False

    def forward(self, mode: Mode, **arguments: Any) -> torch.Tensor:
        result: torch.Tensor = self.model(mode, **arguments)
        return result

    def backward(self, scalar: torch.Tensor) -> None:
        assert not self._averaged, "gradients were already averaged over ranks; step first"
        scalar.backward()

    def multi_backward(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _average(self) -> None:
        if self._averaged:
            return
        self._averaged = True
        if world_size() == 1:
            return
        for name, parameter in self.model.trainable():
            assert parameter.grad is not None, f"{name} has no gradient"
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()

    def step(self, factor: float) -> float:
        self._average()
        parameters = [parameter for _, parameter in self.model.trainable()]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.optimiser_config.clip_norm))
        set_learning_rate(self.optimiser, factor)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._averaged = False
        return norm

    def gradients(self) -> dict[str, torch.Tensor]:
        self._average()
        gradients = {}
        for name, parameter in self.model.trainable():
            assert parameter.grad is not None, f"{name} has no gradient"
            gradients[name] = parameter.grad.detach().cpu().clone()
        return gradients

    def tensors(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.trainable():
            if kind == "parameters":
                tensor = parameter.detach()
            else:
                tensor = self.optimiser.state[parameter].get(kind, torch.zeros_like(parameter))
            yield name, tensor.cpu().clone()

    def load_moments(self, read: Callable[[str, str], torch.Tensor], steps: int) -> None:
        for name, parameter in self.model.trainable():
            if not self.moments:
                continue
            state = {kind: read(kind, name).to(self.device) for kind in self.moments}
            self.optimiser.state[parameter] = {"step": torch.tensor(float(steps)), **state}
