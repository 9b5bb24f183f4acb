"""`TrainedModel`: embedder and objective under one root module, so that every engine sees every parameter.

ZeRO-3 gathers parameters only inside the engine's forward, so whatever touches a parameter goes through
`TrainedModel.forward`; `mode` selects the computation.

Shapes: N texts of this rank (or of one chunk), D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from nvembed.losses.objectives import Objective
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.precision import Precision, autocast
from nvembed.training.sharding import Sharding

Mode = Literal["embed", "objective", "whole", "surrogate"]
# Slices of a chunk: the embedder's input, and how many of its rows count (0 for the dummy text of an empty slice).
Inputs = Sequence[tuple[Mapping[str, torch.Tensor], int]]


class TrainedModel(nn.Module):
    """Embedder and objective under one root.

    Args:
        embedder: weights in float32.
        objective: what the embeddings are trained for; always computed in float32.
        precision: `bf16` runs the embedder under autocast over its float32 weights.
    """

    def __init__(self, embedder: Embedder, objective: Objective, precision: Precision) -> None:
        super().__init__()
        self.embedder = embedder
        self.objective = objective
        self.precision = precision

    def forward(
        self,
        mode: Mode,
        *,
        inputs: Inputs | None = None,
        local_ND: torch.Tensor | None = None,
        gradient_ND: torch.Tensor | None = None,
        sharding: Sharding | None = None,
    ) -> torch.Tensor:
        """One of four computations.

        - `embed`: `inputs` -> [N, D], the rows that count of all slices.
        - `objective`: `local_ND` of this rank, gathered as `sharding` says -> this rank's part of the loss.
        - `whole`: both in one graph.
        - `surrogate`: `inputs`, `gradient_ND` -> sum(embeddings * gradient), whose gradient with respect to the
          weights is the chunk's share of the true one (gradient cache, Gao et al. 2021).
        """
        if mode == "objective":
            assert local_ND is not None and sharding is not None
            return self._objective(local_ND, sharding)
        assert inputs is not None
        embeddings_ND = self._embed(inputs)
        if mode == "embed":
            return embeddings_ND
        if mode == "whole":
            assert sharding is not None
            return self._objective(embeddings_ND, sharding)
        assert gradient_ND is not None
        return (embeddings_ND * gradient_ND).sum()

    def _embed(self, inputs: Inputs) -> torch.Tensor:
        device = inputs[0][0]["input_ids"].device
        with autocast(self.precision, device):  # one region: weights are cast once for all slices
            slices = [self.embedder(**tensors).float()[:count] for tensors, count in inputs]
        return torch.cat(slices)

    def _objective(self, local_ND: torch.Tensor, sharding: Sharding) -> torch.Tensor:
        with torch.autocast(local_ND.device.type, enabled=False):
            part: torch.Tensor = self.objective(sharding.gather(local_ND.float()), sharding.batch, sharding.rows)
        return part

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that are trained, in module order: the content of a checkpoint."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def head_names(self) -> frozenset[str]:
        """Names of the trained parameters that follow `head_learning_rate`: pooling and objective."""
        backbone = {id(parameter) for parameter in self.embedder.embedding_model.parameters()}
        return frozenset(name for name, parameter in self.trainable() if id(parameter) not in backbone)
