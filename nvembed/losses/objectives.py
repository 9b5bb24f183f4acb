"""Objectives: modules that turn the embeddings of a global batch into this rank's part of its loss.

`objective(embeddings_TD, batch, rows)` sums over the examples of `rows` and divides by all B examples, so the parts of
all ranks add up to the loss one process would compute, and so do their gradients.
Whatever an objective learns (temperature, projections) are its parameters; ZeRO-3 gathers them while it runs, so they
are touched in `forward` only.

Shapes: B examples of the global batch, G texts per example, T = B * G texts, R rows of this rank, D width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import nn

from nvembed.losses.config import ContrastiveConfig, DistillConfig, ObjectiveConfig
from nvembed.losses.contrastive import document_mask, info_nce, query_mask, separation
from nvembed.losses.distillation import cosine_distance, similarity_distance
from nvembed.losses.matryoshka import check_prefixes, prefix
from nvembed.types import Batch, UserError


class Objective(nn.Module, ABC):
    """Base of the objectives.

    Attributes:
        separation: of the last forward, see `contrastive.separation`; None for objectives without negatives.
    """

    separation: torch.Tensor | None = None

    @abstractmethod
    def forward(self, embeddings_TD: torch.Tensor, batch: Batch, rows: slice) -> torch.Tensor:
        """This rank's part of the global loss.

        Args:
            embeddings_TD: float32, unit rows in the order of `batch.texts`; zero rows where no text is present.
            batch: the whole global batch.
            rows: the examples this rank answers for.

        Returns:
            Scalar: sum over `rows` of the example losses, divided by B.
        """


class ContrastiveObjective(Objective):
    """InfoNCE against hard negatives, documents of the whole global batch, and other queries, as configured.

    NV-Embed section 4 (stage 1: `in_batch`; stage 2: hard negatives only); query negatives: Gecko, eq. 3.
    The loss is the mean over the full width and every Matryoshka prefix.

    Args:
        config: the recipe's section.
        dim: width of the embeddings.

    Raises:
        UserError: a Matryoshka prefix does not fit the width.
    """

    def __init__(self, config: ContrastiveConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.widths = check_prefixes(config.matryoshka_dims, dim)
        self.log_temperature: nn.Parameter | None = None
        if config.learned_temperature:
            self.log_temperature = nn.Parameter(torch.tensor([math.log(config.temperature)]))

    def forward(self, embeddings_TD: torch.Tensor, batch: Batch, rows: slice) -> torch.Tensor:
        """See `Objective.forward`.

        Raises:
            UserError: the configuration allows hard negatives only and the stream has none.
        """
        if not self.config.in_batch and not self.config.query_negatives and batch.group_size < 3:
            raise UserError(
                "objective.in_batch is false, but the training stream has no hard negatives: nothing to contrast "
                "with. Set stream.num_negatives to at least 1, or objective.in_batch to true."
            )
        temperature = self.log_temperature.exp() if self.log_temperature is not None else self.config.temperature
        masks = self._masks(batch, rows, embeddings_TD.device)
        losses: list[torch.Tensor] = []
        for width in self.widths:
            candidates = self._candidates(prefix(embeddings_TD, width), batch, rows, masks)
            if not losses:  # the full width comes first
                self.separation = separation(*candidates)
            similarity_RC, positive_R, allowed_RC = candidates
            losses.append(info_nce(similarity_RC / temperature, positive_R, allowed_RC).sum())
        return torch.stack(losses).mean() / batch.batch_size

    def _masks(self, batch: Batch, rows: slice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        documents_RBK = torch.from_numpy(document_mask(batch, rows)).to(device)
        if not self.config.in_batch:
            own_RK = [documents_RBK[r, i] for r, i in enumerate(range(*rows.indices(batch.batch_size)))]
            documents_RBK = torch.stack(own_RK) if own_RK else documents_RBK[:, 0]
        queries_RB = torch.from_numpy(query_mask(batch, rows)).to(device) if self.config.query_negatives else None
        return documents_RBK.flatten(1), queries_RB

    def _candidates(
        self,
        embeddings_TD: torch.Tensor,
        batch: Batch,
        rows: slice,
        masks: tuple[torch.Tensor, torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cosines of every candidate [R, C], the column of each positive [R], which candidates count [R, C]."""
        grouped_BGD = embeddings_TD.view(batch.batch_size, batch.group_size, -1)
        query_RD, documents_BKD = grouped_BGD[rows, 0], grouped_BGD[:, 1:]
        allowed_RC, queries_RB = masks
        if self.config.in_batch:
            similarity_RC = query_RD @ documents_BKD.flatten(0, 1).T
            index = torch.arange(batch.batch_size, device=embeddings_TD.device)[rows]
            positive_R = index * documents_BKD.shape[1]
        else:
            similarity_RC = torch.einsum("rd,rkd->rk", query_RD, documents_BKD[rows])
            positive_R = torch.zeros(query_RD.shape[0], dtype=torch.long, device=embeddings_TD.device)
        if queries_RB is not None:
            similarity_RC = torch.cat([similarity_RC, query_RD @ grouped_BGD[:, 0].T], dim=1)
            allowed_RC = torch.cat([allowed_RC, queries_RB], dim=1)
        return similarity_RC, positive_R, allowed_RC


class DistillObjective(Objective):
    """Cosine match to stored teacher vectors, with an up-projection for the full width and every prefix.

    The projections start as the identity on the first coordinates: a student cut out of its teacher shares the
    teacher's basis. `projections.<width>.weight` is [teacher width, width].

    Args:
        config: the recipe's section.
        dim: width of the student's embeddings.
        teacher_dim: width of the teacher's vectors.

    Raises:
        UserError: the student is wider than the teacher, both weights are zero, or a prefix does not fit.
    """

    def __init__(self, config: DistillConfig, dim: int, teacher_dim: int) -> None:
        super().__init__()
        if dim > teacher_dim:
            raise UserError(
                f"the student's embedding ({dim}) is wider than the teacher's ({teacher_dim}); the distill objective "
                "projects the student up. Choose a narrower student."
            )
        if config.cosine_weight == 0 and config.similarity_weight == 0:
            raise UserError("objective.cosine_weight and objective.similarity_weight are both 0: nothing to learn.")
        self.config = config
        self.widths = check_prefixes(config.matryoshka_dims, dim)
        # Without the cosine term nothing trains the projections, and ZeRO wants a gradient for every parameter.
        trained = self.widths if config.cosine_weight else ()
        self.projections = nn.ModuleDict()
        for width in trained:
            linear = nn.Linear(width, teacher_dim, bias=False)
            nn.init.eye_(linear.weight)
            self.projections[str(width)] = linear

    def forward(self, embeddings_TD: torch.Tensor, batch: Batch, rows: slice) -> torch.Tensor:
        """See `Objective.forward`; the batch carries `teacher_vectors` and one text per example.

        Raises:
            UserError: the stream has no teacher vectors, or pairs instead of single texts.
        """
        if batch.teacher_vectors is None or batch.group_size != 1:
            raise UserError("objective.type is distill, but the stream was not made by the distill_stream step.")
        teacher_BT = torch.from_numpy(batch.teacher_vectors).to(embeddings_TD)
        losses: list[torch.Tensor] = []
        for width in self.widths:
            student_BS = prefix(embeddings_TD, width)
            loss_R = embeddings_TD.new_zeros(teacher_BT[rows].shape[0])
            if self.config.cosine_weight:
                projected_RT = self.projections[str(width)](student_BS[rows])
                loss_R = loss_R + self.config.cosine_weight * cosine_distance(projected_RT, teacher_BT[rows])
            if self.config.similarity_weight:
                loss_R = loss_R + self.config.similarity_weight * similarity_distance(student_BS, teacher_BT, rows)
            losses.append(loss_R.sum())
        return torch.stack(losses).mean() / batch.batch_size


def build_objective(config: ObjectiveConfig, *, dim: int, teacher_dim: int | None) -> Objective:
    """The objective of a recipe's section.

    Args:
        config: contrastive or distill.
        dim: width of the embeddings it is given.
        teacher_dim: width of the stream's teacher vectors; None when it has none.

    Raises:
        UserError: distillation without teacher vectors, or sizes that do not fit.
    """
    if isinstance(config, ContrastiveConfig):
        return ContrastiveObjective(config, dim)
    if teacher_dim is None:
        raise UserError("objective.type is distill, but the stream has no teacher vectors (see distill_stream).")
    return DistillObjective(config, dim, teacher_dim)
