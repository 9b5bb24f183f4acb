"""Objectives against independent plain-loop transcriptions of their formulas, in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.losses.config import ContrastiveConfig, DistillConfig
from nvembed.losses.contrastive import document_mask, query_mask
from nvembed.losses.objectives import build_objective
from nvembed.types import Batch, UserError


def make_batch(
    rng: np.random.Generator, size: int, group: int, *, pool: int = 1000, absent: float = 0.0, teacher_dim: int = 0
) -> Batch:
    """A batch with document ids drawn from a small pool, so that copies and known positives occur."""
    present = rng.random((size, group)) >= absent
    present[:, :2] = True
    ids = rng.integers(1, pool, (size, group))
    ids[:, 0] = 0
    ids[~present] = 0
    known = [
        np.unique(np.append(rng.integers(1, pool, 2), ids[i, 1])) if group > 1 else np.zeros(0) for i in range(size)
    ]
    texts = [
        f"q{rng.integers(0, pool)}" if role == 0 else f"d{ids[i, role]}" for i in range(size) for role in range(group)
    ]
    return Batch(
        step=0,
        example_ids=[f"e{i}" for i in range(size)],
        texts=[text if here else "" for text, here in zip(texts, present.ravel(), strict=True)],
        instructions=[""] * (size * group),
        token_lengths=present.ravel().astype(np.int32),
        present=present,
        document_ids=ids.astype(np.int64),
        positive_ids=[k.astype(np.int64) for k in known],
        teacher_vectors=rng.normal(size=(size, teacher_dim)).astype(np.float32) if teacher_dim else None,
    )


def make_embeddings(rng: np.random.Generator, batch: Batch, dim: int) -> torch.Tensor:
    """Unit rows that do not depend on the ids; zero rows where absent."""
    vectors = rng.normal(size=(batch.present.size, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[~batch.present.ravel()] = 0.0
    return torch.from_numpy(vectors)


def plain_contrastive(config: ContrastiveConfig, vectors: np.ndarray, batch: Batch) -> float:
    """The contrastive loss in nested loops, written from the sentences of the docstrings, not from the code."""
    size, group = batch.batch_size, batch.group_size
    total = 0.0
    widths = [vectors.shape[1], *config.matryoshka_dims]
    for width in widths:
        for i in range(size):
            known = set(batch.positive_ids[i].tolist()) | {int(batch.document_ids[i, 1])}
            own = {int(batch.document_ids[i, k]) for k in range(1, group) if batch.present[i, k]}

            def cosine(a: int, b: int, width: int = width) -> float:
                u, v = vectors[a][:width], vectors[b][:width]
                return float(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)))

            exponents = [cosine(i * group, i * group + 1) / config.temperature]
            counted: set[int] = set()
            for k in range(2, group):  # own hard negatives first: a copy elsewhere is not counted again
                key = int(batch.document_ids[i, k])
                if batch.present[i, k] and key not in known and key not in counted:
                    counted.add(key)
                    exponents.append(cosine(i * group, i * group + k) / config.temperature)
            if config.in_batch:
                for j in range(size):
                    for k in range(1, group):
                        key = int(batch.document_ids[j, k])
                        if j == i or not batch.present[j, k] or key in known | own | counted:
                            continue
                        counted.add(key)
                        exponents.append(cosine(i * group, j * group + k) / config.temperature)
            if config.query_negatives:
                for j in range(size):
                    theirs = set(batch.positive_ids[j].tolist()) | {int(batch.document_ids[j, 1])}
                    if batch.texts[i * group] != batch.texts[j * group] and not known & theirs:
                        exponents.append(cosine(i * group, j * group) / config.temperature)
            top = max(exponents)
            total += top + math.log(sum(math.exp(e - top) for e in exponents)) - exponents[0]
    return total / size / len(widths)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(2, 6),
    group=st.integers(2, 5),
    pool=st.sampled_from([4, 12, 10_000]),
    in_batch=st.booleans(),
    query_negatives=st.booleans(),
    prefixes=st.sampled_from([(), (3,), (5, 2)]),
)
def test_contrastive_equals_plain_loops(
    seed: int, size: int, group: int, pool: int, in_batch: bool, query_negatives: bool, prefixes: tuple[int, ...]
) -> None:
    if not in_batch and not query_negatives:
        group = max(group, 3)
    rng = np.random.default_rng(seed)
    batch = make_batch(rng, size, group, pool=pool, absent=0.3)
    vectors = make_embeddings(rng, batch, 8)
    # Copies of a document are the same text, so they have the same embedding.
    for row, key in enumerate(batch.document_ids.ravel()):
        if key:
            vectors[row] = vectors[int(np.flatnonzero(batch.document_ids.ravel() == key)[0])]
    config = ContrastiveConfig(
        in_batch=in_batch, query_negatives=query_negatives, temperature=0.1, matryoshka_dims=prefixes
    )
    objective = build_objective(config, dim=8, teacher_dim=None)
    loss = objective(vectors, batch, slice(0, size))
    assert float(loss) == pytest.approx(plain_contrastive(config, vectors.numpy(), batch), rel=1e-10)


@given(
    seed=st.integers(0, 2**32 - 1), size=st.integers(1, 5), group=st.integers(2, 4), ranks=st.integers(1, 3),
    in_batch=st.booleans(),
)  # fmt: skip
def test_separation_equals_plain_loops_and_ranks_add_up(
    seed: int, size: int, group: int, ranks: int, in_batch: bool
) -> None:
    rng = np.random.default_rng(seed)
    batch = make_batch(rng, size, max(group, 2 if in_batch else 3), pool=6, absent=0.3)
    vectors = make_embeddings(rng, batch, 8).requires_grad_()
    objective = build_objective(
        ContrastiveConfig(in_batch=in_batch, matryoshka_dims=(3,), temperature=0.1), dim=8, teacher_dim=None
    )
    mask_RBK = document_mask(batch, slice(0, size))
    texts_BGD = vectors.detach().numpy().reshape(size, batch.group_size, 8)
    expected = np.zeros(4)
    for i in range(size):
        negatives = [
            float(texts_BGD[i, 0] @ texts_BGD[j, k + 1])
            for j in (range(size) if in_batch else [i])
            for k in range(batch.group_size - 1)
            if mask_RBK[i, j, k] and (j, k) != (i, 0)
        ]
        if negatives:
            positive = float(texts_BGD[i, 0] @ texts_BGD[i, 1])
            expected += [positive, np.mean(negatives), max(negatives), 1]
    found = torch.zeros(4, dtype=torch.float64)
    for rank in range(ranks):
        objective(vectors, batch, slice(rank * size // ranks, (rank + 1) * size // ranks))
        assert objective.separation is not None and not objective.separation.requires_grad
        found += objective.separation
    assert found.numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_learned_temperature_starts_at_the_configured_one_and_has_its_gradient(learned: bool) -> None:
    rng = np.random.default_rng(0)
    batch = make_batch(rng, 4, 3)
    vectors = make_embeddings(rng, batch, 8)
    config = ContrastiveConfig(temperature=0.07, learned_temperature=learned)
    objective = build_objective(config, dim=8, teacher_dim=None).double()
    loss = objective(vectors, batch, slice(0, 4))
    assert loss.item() == pytest.approx(plain_contrastive(config, vectors.numpy(), batch), rel=1e-6)
    parameters = dict(objective.named_parameters())
    assert set(parameters) == ({"log_temperature"} if learned else set())
    if learned:
        loss.backward()
        step = 1e-5
        values = [
            plain_contrastive(config.model_copy(update={"temperature": 0.07 * math.exp(d)}), vectors.numpy(), batch)
            for d in (step, -step)
        ]
        assert float(parameters["log_temperature"].grad) == pytest.approx(
            (values[0] - values[1]) / (2 * step), rel=1e-4
        )


@pytest.mark.parametrize(
    ("config", "group", "teacher_dim"),
    [
        (ContrastiveConfig(temperature=0.1, matryoshka_dims=(4,), query_negatives=True), 4, None),
        (ContrastiveConfig(temperature=0.1, in_batch=False), 4, None),
        (ContrastiveConfig(temperature=0.1, learned_temperature=True), 3, None),
        (DistillConfig(matryoshka_dims=(4,), similarity_weight=0.5), 1, 12),
    ],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_ranks_add_up_to_the_loss_and_gradient_of_one_process(config, group, teacher_dim, ranks: int) -> None:
    rng = np.random.default_rng(1)
    batch = make_batch(rng, 6, group, pool=8, absent=0.2 if group > 1 else 0.0, teacher_dim=teacher_dim or 0)
    vectors = make_embeddings(rng, batch, 8)
    objective = build_objective(config, dim=8, teacher_dim=teacher_dim).double()

    def gradients(slices: list[slice]) -> tuple[float, list[torch.Tensor]]:
        leaf = vectors.clone().requires_grad_()
        total = sum(objective(leaf, batch, rows) for rows in slices)
        inputs = [leaf, *objective.parameters()]
        return total.item(), list(torch.autograd.grad(total, inputs))

    whole_loss, whole = gradients([slice(0, 6)])
    parts_loss, parts = gradients([slice(r * 6 // ranks, (r + 1) * 6 // ranks) for r in range(ranks)])
    assert parts_loss == pytest.approx(whole_loss, rel=1e-12)
    for ours, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert all(float(g.abs().sum()) > 0 for g in whole)


def test_known_positives_copies_and_absent_documents_are_no_negatives() -> None:
    batch = Batch(
        step=0,
        example_ids=["a", "b", "c"],
        texts=["qa", "d1", "d2", "qb", "d3", "d1", "qc", "d2", ""],
        instructions=[""] * 9,
        token_lengths=np.ones(9, np.int32),
        present=np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]], bool),
        document_ids=np.array([[0, 1, 2], [0, 3, 1], [0, 2, 0]]),
        positive_ids=[np.array([1, 3]), np.array([3]), np.array([2])],
    )
    expected = [
        # a: own positive 1, own negative 2; 3 is a known positive; 1 and 2 elsewhere are copies of its own
        [[1, 1], [0, 0], [0, 0]],
        # b: 1 is its own negative, so it counts there; 2 counts once, at its first place
        [[0, 1], [1, 1], [0, 0]],
        # c: its positive 2 stands in another example too and does not count there; 1 counts once; 3 counts
        [[1, 0], [1, 0], [1, 0]],
    ]
    assert document_mask(batch, slice(0, 3)).astype(int).tolist() == expected
    assert document_mask(batch, slice(1, 2)).astype(int).tolist() == expected[1:2]
    assert document_mask(batch, slice(1, 1)).shape == (0, 3, 2)
    # a and b share the known positive 3; nobody is a negative of itself
    assert query_mask(batch, slice(0, 3)).astype(int).tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 6), group=st.integers(2, 5))
def test_mask_counts_every_allowed_document_exactly_once(seed: int, size: int, group: int) -> None:
    batch = make_batch(np.random.default_rng(seed), size, group, pool=6, absent=0.3)
    masks = document_mask(batch, slice(0, size))
    ids = batch.document_ids[:, 1:]
    there = set(ids[batch.present[:, 1:]].tolist())
    for i in range(size):
        assert masks[i, i, 0]
        chosen = ids[masks[i]].tolist()
        known = set(batch.positive_ids[i].tolist()) | {int(ids[i, 0])}
        assert len(chosen) == len(set(chosen))
        assert set(chosen) == (there - known) | {int(ids[i, 0])}
        assert not (masks[i] & ~batch.present[:, 1:]).any()


def test_masked_positions_get_no_gradient() -> None:
    rng = np.random.default_rng(3)
    batch = make_batch(rng, 4, 4, pool=6, absent=0.4)
    vectors = make_embeddings(rng, batch, 8).requires_grad_()
    build_objective(ContrastiveConfig(matryoshka_dims=(4,)), dim=8, teacher_dim=None)(
        vectors, batch, slice(0, 4)
    ).backward()
    gradient = vectors.grad.view(4, 4, 8)
    assert torch.isfinite(gradient).all()
    assert (gradient[~torch.from_numpy(batch.present)] == 0).all()


def test_distillation_equals_plain_loops() -> None:
    rng = np.random.default_rng(4)
    batch = make_batch(rng, 5, 1, teacher_dim=12)
    vectors = make_embeddings(rng, batch, 8)
    config = DistillConfig(matryoshka_dims=(4, 2), cosine_weight=0.7, similarity_weight=0.3)
    objective = build_objective(config, dim=8, teacher_dim=12).double()
    for linear in objective.projections.values():
        torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(1))
    teacher = batch.teacher_vectors.astype(np.float64)
    total = 0.0
    for width in (8, 4, 2):
        weight = objective.projections[str(width)].weight.detach().numpy()
        for i in range(5):
            s = vectors.numpy()[i, :width] / np.linalg.norm(vectors.numpy()[i, :width])
            projected = weight @ s
            cosine = projected @ teacher[i] / np.linalg.norm(projected) / np.linalg.norm(teacher[i])
            total += 0.7 * (1 - cosine)
            for j in range(5):
                o = vectors.numpy()[j, :width] / np.linalg.norm(vectors.numpy()[j, :width])
                theirs = teacher[i] @ teacher[j] / np.linalg.norm(teacher[i]) / np.linalg.norm(teacher[j])
                total += 0.3 * (s @ o - theirs) ** 2 / 5
    assert objective(vectors, batch, slice(0, 5)).item() == pytest.approx(total / 5 / 3, rel=1e-7)


def test_projections_start_as_the_identity_on_the_first_coordinates() -> None:
    objective = build_objective(DistillConfig(matryoshka_dims=(4,)), dim=8, teacher_dim=8)
    assert {name: tuple(p.shape) for name, p in objective.named_parameters()} == {
        "projections.8.weight": (8, 8),
        "projections.4.weight": (8, 4),
    }
    rng = np.random.default_rng(5)
    batch = make_batch(rng, 3, 1, teacher_dim=8)
    same = torch.nn.functional.normalize(torch.from_numpy(batch.teacher_vectors), dim=1)
    full = build_objective(DistillConfig(), dim=8, teacher_dim=8)
    assert full(same, batch, slice(0, 3)).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_objective(ContrastiveConfig(matryoshka_dims=(8,)), dim=8, teacher_dim=None), "8 wide"),
        (lambda: build_objective(ContrastiveConfig(matryoshka_dims=(4, 4)), dim=8, teacher_dim=None), "twice"),
        (lambda: build_objective(DistillConfig(), dim=8, teacher_dim=None), "no teacher vectors"),
        (lambda: build_objective(DistillConfig(), dim=8, teacher_dim=4), "wider than the teacher"),
        (lambda: build_objective(DistillConfig(cosine_weight=0), dim=8, teacher_dim=8), "nothing to learn"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_streams_that_do_not_fit_are_refused() -> None:
    rng = np.random.default_rng(6)
    pairs = make_batch(rng, 2, 2)
    vectors = make_embeddings(rng, pairs, 8)
    with pytest.raises(UserError, match="no hard negatives"):
        build_objective(ContrastiveConfig(in_batch=False), dim=8, teacher_dim=None)(vectors, pairs, slice(0, 2))
    with pytest.raises(UserError, match="distill_stream"):
        build_objective(DistillConfig(), dim=8, teacher_dim=8)(vectors.float(), pairs, slice(0, 2))
