"""Distances between student embeddings and teacher vectors.

Shapes: R rows of this rank, B texts of the global batch, S student width, T teacher width.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def cosine_distance(student_RT: torch.Tensor, teacher_RT: torch.Tensor) -> torch.Tensor:
    """1 - cos(student, teacher) per row, the student already projected to the teacher's width.

    Jasper and Stella (arXiv 2412.19048) section 3.2, eq. 1; jina-embeddings-v5 projects the student up, not the
    teacher down, so that nothing of the teacher is thrown away.

    Returns:
        [R], between 0 and 2.
    """
    return 1.0 - F.cosine_similarity(student_RT, teacher_RT, dim=-1)


def similarity_distance(student_BS: torch.Tensor, teacher_BT: torch.Tensor, rows: slice) -> torch.Tensor:
    """Mean squared difference of the rows of both similarity matrices (Jasper and Stella, eq. 2).

    Args:
        student_BS: unit rows of the whole global batch.
        teacher_BT: teacher vectors in the same order; normalised here.

    Returns:
        [R], the mean over the B columns for each row of `rows`.
    """
    teacher_BT = F.normalize(teacher_BT, dim=-1)
    student_RB = student_BS[rows] @ student_BS.T
    teacher_RB = teacher_BT[rows] @ teacher_BT.T
    return (student_RB - teacher_RB).square().mean(dim=1)
