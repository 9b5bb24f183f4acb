"""DeepSpeed ZeRO 0-3 behind the engine interface.

Facts of DeepSpeed 0.19 that this file works around, each covered by a test:
- Several `backward` calls per step are silently wrong under ZeRO 1 and 2; `coalesce_grad_reduction` makes them right.
- Under ZeRO 1 and 2 optimiser state is linked to parameters at the first step only, so before it nothing can be read
  or restored. The state AdamW would make is made here at the start.
- Under ZeRO 3 setting a whole tensor fails on the last rank when its size does not divide by the ranks
  (`set_full_hp_param` does not pad); each rank sets its own padded piece.
- Stage 0 reports no gradient norm, so it is clipped by the same torch function as in the torch engine.
- On CPU the shared-memory communication op is compiled at start; a process killed meanwhile leaves a lock that later
  ones wait for without end. It is switched off.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from nvembed.training.arithmetic import deepspeed_config
from nvembed.training.config import DeepSpeedEngineConfig, OptimiserConfig
from nvembed.training.engine import Engine, build_optimiser, set_learning_rate
from nvembed.training.model import Mode, TrainedModel


class DeepSpeedEngine(Engine):
    """`Engine` over DeepSpeed ZeRO."""

    def __init__(
        self, model: TrainedModel, optimiser: OptimiserConfig, config: DeepSpeedEngineConfig, device: torch.device
    ):
        super().__init__(model, optimiser, config, device)
        deepspeed = _import_deepspeed(device)
        self._accessors = deepspeed.utils
        self._stage = config.zero_stage
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[parameter for _, parameter in model.trainable()],
            optimizer=build_optimiser(model, optimiser),
            config=deepspeed_config(
                config,
                optimiser,
                trained=sum(parameter.numel() for _, parameter in model.trainable()),
                whole=sum(parameter.numel() for parameter in model.parameters()),
            ),
        )
        self._make_moments()

    def forward(self, mode: Mode, **arguments: Any) -> torch.Tensor:
        result: torch.Tensor = self._engine(mode, **arguments)
        return result

    def backward(self, scalar: torch.Tensor) -> None:
        self._engine.backward(scalar)

    @contextmanager
    def multi_backward(self) -> Iterator[None]:
        if self._stage > 0:
            with self._engine.coalesce_grad_reduction():
                yield
            return
        with self._engine.no_sync():
            yield
        self._engine.allreduce_gradients()

    def step(self, factor: float) -> float:
        set_learning_rate(self._engine.optimizer, factor)
        if self._stage == 0:
            parameters = [parameter for _, parameter in self.model.trainable()]
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.optimiser_config.clip_norm))
            self._engine.step()
            return norm
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def gradients(self) -> dict[str, torch.Tensor]:
        gradients = {}
        for name, parameter in self.model.trainable():
            # Not safe_get_full_grad under ZeRO 1 and 2: it returns `parameter.grad`, this rank's own, where it lives.
            whole = getattr(parameter, "get_full_hp_grad", None)
            gradient = whole() if whole else self._accessors.safe_get_full_grad(parameter)
            assert gradient is not None, f"{name} has no gradient"
            gradients[name] = gradient.detach().cpu().clone()
        return gradients

    def tensors(self, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.trainable():
            if self._stage == 0:
                tensor = parameter if kind == "parameters" else self._engine.optimizer.state[parameter][kind]
            elif kind == "parameters":
                tensor = self._accessors.safe_get_full_fp32_param(parameter)
            else:
                tensor = self._accessors.safe_get_full_optimizer_state(parameter, kind)
            yield name, tensor.detach().float().cpu().clone()

    def load_moments(self, read: Callable[[str, str], torch.Tensor], steps: int) -> None:
        for name, parameter in self.model.trainable():
            for kind in self.moments:
                value = read(kind, name).to(self.device)
                if self._stage == 0:
                    self._engine.optimizer.state[parameter][kind].copy_(value)
                elif self._stage == 3:
                    self._accessors.safe_set_local_optimizer_state(parameter, _own_partition(value, parameter), kind)
                else:
                    self._accessors.safe_set_full_optimizer_state(parameter, value, kind)
        for masters in self._masters():
            if self.moments:
                self._torch_optimiser.state[masters]["step"] = torch.tensor(float(steps))

    @property
    def _torch_optimiser(self) -> torch.optim.Optimizer:
        optimiser: torch.optim.Optimizer = self._engine.basic_optimizer
        return optimiser

    def _masters(self) -> list[torch.Tensor]:
        """The float32 tensors the torch optimiser updates: parameters, or this rank's flat partitions."""
        if self._stage == 0:
            return [parameter for _, parameter in self.model.trainable()]
        wrapper = self._engine.optimizer
        partitions = (
            wrapper.fp32_partitioned_groups_flat if self._stage == 3 else wrapper.single_partition_of_fp32_groups
        )
        return list(partitions)

    def _make_moments(self) -> None:
        """Zero moments at step count 0: what AdamW itself would make at its first step."""
        if not self.moments:
            return
        for masters in self._masters():
            state = {kind: torch.zeros_like(masters) for kind in self.moments}
            self._torch_optimiser.state[masters] = {"step": torch.tensor(0.0), **state}
        if self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _own_partition(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """This rank's piece of a whole tensor under ZeRO-3, padded with zeros like DeepSpeed's own."""
    size, rank = parameter.ds_tensor.numel(), dist.get_rank()
    padded = value.new_zeros(size * dist.get_world_size())
    padded[: value.numel()] = value.flatten()
    return padded[rank * size : (rank + 1) * size]


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed on this device type, talking over the process group that exists (or one of this process alone)."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed
