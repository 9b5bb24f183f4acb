"""Batches and parameters of the stages a recipe trains.

What depends on texts that were not read yet is counted at `length` tokens per text: `max_length` gives upper bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nvembed.losses.config import ContrastiveConfig
from nvembed.modeling.config import LoraConfig, MeanConfig, PoolingConfig
from nvembed.modeling.shapes import Shape, known_shape, pooling_parameters
from nvembed.recipe.schema import Recipe
from nvembed.training.config import TrainConfig


@dataclass(frozen=True)
class Model:
    """The model of a stage, without its adapter."""

    shape: Shape
    pooling: PoolingConfig

    @property
    def head(self) -> int:
        """Parameters of the pooling."""
        return pooling_parameters(self.pooling, self.shape.hidden)

    @property
    def parameters(self) -> int:
        """Parameters of the embedder."""
        return self.shape.parameters + self.head


@dataclass(frozen=True)
class StageSizes:
    """A stage in numbers.

    Attributes:
        name: section of the recipe.
        train: how it is trained.
        steps: optimiser steps.
        batch: examples of a global batch.
        group: texts of an example.
        max_length: tokens of a text at most.
        model: None where the backbone's sizes are not known here.
        objective: parameters of the objective.
    """

    name: str
    train: TrainConfig
    steps: int
    batch: int
    group: int
    max_length: int
    model: Model | None
    objective: int = 0

    @property
    def workers(self) -> int:
        """Ranks."""
        return self.train.num_workers

    @property
    def texts(self) -> int:
        """Texts of a global batch."""
        return self.batch * self.group

    @property
    def examples_per_rank(self) -> int:
        """Examples whose losses a rank computes."""
        return self.batch // self.workers

    def chunks_per_rank(self, length: float | None = None) -> int:
        """Chunks of one rank and optimiser step, when every text has `length` tokens (`max_length` by default)."""
        per_chunk = max(1, int(self.train.token_budget // (length or self.max_length)))
        chunks = -(-self.texts // per_chunk)
        return -(-chunks // self.workers)

    def chunk_tokens(self, length: float | None = None) -> float:
        """Tokens of one chunk, whose graph is in memory at once."""
        return -(-self.texts // (self.chunks_per_rank(length) * self.workers)) * (length or self.max_length)

    @property
    def lora(self) -> int:
        """Parameters of the adapter."""
        adapter = self.train.adapter
        if self.model is None or not isinstance(adapter, LoraConfig):
            return 0
        shape = self.model.shape
        sizes = [shape.linears[name] for name in adapter.target_modules if name in shape.linears]
        return shape.layers * sum(adapter.r * (inputs + outputs) for inputs, outputs in sizes)

    @property
    def whole(self) -> int | None:
        """Every parameter a rank's root module has: embedder, adapter, objective."""
        return None if self.model is None else self.model.parameters + self.lora + self.objective

    @property
    def trained(self) -> int | None:
        """Those of them that are trained."""
        if self.model is None:
            return None
        return self.trained_backbone + self.model.head + self.objective

    @property
    def trained_backbone(self) -> int:
        """Trained parameters of the backbone, or of its adapter."""
        assert self.model is not None
        adapter = self.train.adapter
        if isinstance(adapter, LoraConfig):
            return self.lora
        shape = self.model.shape
        return shape.parameters - (shape.embedding_parameters if adapter.freeze_embeddings else 0)


def stage_sizes(recipe: Recipe) -> list[StageSizes]:
    """The stages a recipe has, in their order."""
    model, length = None, 512
    if recipe.initialise is not None:
        shape = known_shape(recipe.initialise.backbone)
        embedder = recipe.initialise.embedder
        model = Model(shape, embedder.pooling) if shape is not None else None
        length = embedder.text.max_length
    stages = []
    for name, stage in (("stage_1", recipe.stage_1), ("stage_2", recipe.stage_2)):
        if stage is not None:
            stream, objective = stage.stream, stage.train.objective
            learned = int(isinstance(objective, ContrastiveConfig) and objective.learned_temperature)
            stages.append(
                StageSizes(
                    name, stage.train, stream.steps, stream.global_batch_size, 2 + stream.num_negatives, length, model,
                    learned,
                )
            )  # fmt: skip
    if recipe.student is not None:
        student = recipe.student
        small = replace(model.shape, layers=student.init.num_layers) if model is not None else None
        stages.append(
            StageSizes(
                "student", student.train, student.stream.steps, student.stream.global_batch_size, 1, length,
                Model(small, MeanConfig()) if small is not None else None,
                _projections(student.train, small.hidden) if small is not None else 0,
            )
        )  # fmt: skip
    return stages


def _projections(train: TrainConfig, dim: int) -> int:
    """Parameters of the distillation objective: width x teacher width for the full width and every prefix."""
    objective = train.objective
    if isinstance(objective, ContrastiveConfig) or not objective.cosine_weight:
        return 0
    return sum(width * dim for width in {dim, *objective.matryoshka_dims})
