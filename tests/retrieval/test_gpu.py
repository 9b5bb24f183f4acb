"""Search and encoding on a CUDA device give what the CPU gives. Skipped where there is no device."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nvembed import encode_texts, mine_vectors, search_vectors
from nvembed.retrieval.config import FolderModel
from nvembed.retrieval.exact.bounds import _keeps_the_bound, has_bounded_bf16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def problem(documents: int = 60_000, queries: int = 500, dim: int = 384, ties: bool = False):
    """Unit vectors around centres; with `ties`, many documents differ by less than bf16 resolves."""
    generator = np.random.default_rng(3)
    centres = generator.standard_normal((50, dim))
    noise = 1e-4 if ties else 1.0
    matrix = centres[generator.integers(50, size=documents)] + noise * generator.standard_normal((documents, dim))
    query = matrix[generator.integers(documents, size=queries)] + 0.1 * generator.standard_normal((queries, dim))
    return tuple((part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32) for part in (query, matrix))


def test_products_of_the_device_keep_to_the_bound() -> None:
    assert _keeps_the_bound("cuda") and has_bounded_bf16("cuda")


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_device_finds_the_same_rows_and_scores(precision: str, ties: bool) -> None:
    query, matrix = problem(ties=ties)
    rows, scores = search_vectors(query, matrix, 30, precision="fp32")
    found, values = search_vectors(query, matrix, 30, precision=precision, device="cuda")
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_array_equal(values, scores)
    ceiling = scores[:, 5]
    below, _ = search_vectors(query, matrix, 30, ceiling=ceiling, precision="fp32")
    np.testing.assert_array_equal(search_vectors(query, matrix, 30, ceiling=ceiling, device="cuda")[0], below)


def test_the_same_negatives_are_mined_on_the_device() -> None:
    query, matrix = problem()
    positives = [[int(row)] for row in search_vectors(query, matrix, 1)[0][:, 0]]
    rule = {"type": "topk_percpos", "max_negative_to_positive_ratio": 0.95}
    expected = mine_vectors(query, matrix, positives, 8, rule)
    np.testing.assert_array_equal(mine_vectors(query, matrix, positives, 8, rule, device="cuda"), expected)


def test_texts_are_embedded_on_the_device_as_on_the_cpu(gpu_folder: Path) -> None:
    texts = [f"{'a longer sentence about the sea ' * (number % 7)}number {number}" for number in range(200)]
    model = FolderModel(folder=str(gpu_folder))
    expected = encode_texts(texts, model, precision="fp32")
    found = encode_texts(texts, model, precision="fp32", device="cuda")
    np.testing.assert_allclose(found, expected, atol=1e-4)
    half = encode_texts(texts, model, precision="bf16", device="cuda")
    assert (half * expected).sum(axis=1).min() > 0.998


@pytest.fixture(scope="module")
def gpu_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random weights."""
    from nvembed.modeling.assemble import build_embedder
    from nvembed.modeling.backbones import load_backbone
    from nvembed.modeling.config import EmbedderConfig, LatentAttentionConfig, RandomBackbone
    from nvembed.modeling.folder import save_embedder
    from nvembed.text.config import TextConfig

    backbone = RandomBackbone(
        family="qwen3", vocab_size=500, hidden_size=128, intermediate_size=256, num_layers=3, num_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    config = EmbedderConfig(pooling=LatentAttentionConfig(num_latents=16, num_heads=4), text=TextConfig(max_length=64))
    corpus = ["a longer sentence about the sea and numbers 0 1 2 3 4 5 6 7 8 9"] * 20
    folder = tmp_path_factory.mktemp("model")
    save_embedder(build_embedder(*load_backbone(backbone, corpus, 0), config, 0), folder)
    return folder
