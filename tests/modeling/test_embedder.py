"""The embedder: unit vectors that depend on their own text only, in the order asked for."""

import numpy as np
import pytest
import torch

from nvembed.modeling.config import LastTokenConfig, MeanConfig
from nvembed.modeling.precision import resolve_precision
from nvembed.text.instructions import CATALOGUE, instruction_prefix
from nvembed.types import UserError

PREFIX = instruction_prefix("web_search")
TEXTS = ["how do I sort a list", "?", "heap overflow", "a " * 200, "Größe 東京 🙂", "heap overflow", "x"]
POOLINGS = {"latent": {}, "mean": {"pooling": MeanConfig()}, "last": {"pooling": LastTokenConfig()}}


@pytest.fixture(params=POOLINGS)
def embedder(request, make_embedder):
    return make_embedder(**POOLINGS[request.param])


def test_unit_float32_vectors_in_order(embedder):
    vectors = embedder.encode(TEXTS, prompt=PREFIX)
    assert vectors.dtype == np.float32 and vectors.shape == (7, embedder.dim) == (7, 64)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(vectors[2], vectors[5])
    for index, text in enumerate(TEXTS):
        np.testing.assert_allclose(vectors[index], embedder.encode([text], prompt=PREFIX)[0], atol=1e-5)
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=2) + 10 * np.eye(7)
    distances[2, 5] = distances[5, 2] = 10
    assert distances.min() > 1e-3  # other texts have other vectors


@pytest.mark.parametrize("budget", [1, 64, 100_000])
def test_the_budget_changes_nothing(embedder, budget):
    instructions = [PREFIX, "", PREFIX, "", PREFIX, PREFIX, ""]
    expected = np.concatenate(
        [embedder.encode([text], prompt=prefix) for text, prefix in zip(TEXTS, instructions, strict=True)]
    )
    np.testing.assert_allclose(embedder.encode(TEXTS, prompt=instructions, token_budget=budget), expected, atol=1e-5)


def test_an_instruction_is_a_sentence_or_a_key(embedder):
    expected = embedder.encode(TEXTS, prompt=PREFIX)
    for instruction in ("web_search", CATALOGUE["web_search"], ["web_search"] * len(TEXTS)):
        np.testing.assert_array_equal(embedder.encode(TEXTS, instruction), expected)
    embedder.prompts = {"document": "", "query": PREFIX}
    np.testing.assert_array_equal(embedder.encode(TEXTS, prompt_name="query"), expected)
    np.testing.assert_array_equal(embedder.encode(TEXTS, prompt_name="document"), embedder.encode(TEXTS))
    for problem, options in (
        ("Did you mean 'web_search'", {"instruction": "web_serch"}),
        ("is a rendered prompt", {"instruction": PREFIX}),
        ("Did you mean 'query'", {"prompt_name": "qeury"}),
        ("are both given", {"instruction": "cwe", "prompt_name": "query"}),
    ):
        with pytest.raises(UserError, match=problem):
            embedder.encode(["a"], **options)


def test_an_empty_text_has_a_vector(embedder):
    """As with sentence-transformers; `encode_texts`, `embed` and mining count empty texts as mistakes."""
    vectors = embedder.encode([*TEXTS, ""], prompt=[PREFIX] * 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(vectors[:7], embedder.encode(TEXTS, prompt=PREFIX), atol=1e-5)


def test_it_repeats_to_the_bit(embedder):
    np.testing.assert_array_equal(embedder.encode(TEXTS, prompt=PREFIX), embedder.encode(TEXTS, prompt=PREFIX))


def test_no_texts(embedder):
    assert embedder.encode([]).shape == (0, 64) and embedder.encode([]).dtype == np.float32
    assert embedder.encode([], dim=16).shape == (0, 16)


def test_matryoshka_prefix_is_renormalised(embedder):
    whole, part = embedder.encode(TEXTS), embedder.encode(TEXTS, dim=16)
    expected = whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(part, expected, atol=1e-6)


def test_bf16_is_close_and_comes_back_as_float32(embedder):
    half = embedder.encode(TEXTS, prompt=PREFIX, precision="bf16")
    whole = embedder.encode(TEXTS, prompt=PREFIX)
    assert half.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)
    assert (half * whole).sum(axis=1).min() > 0.99 and not np.array_equal(half, whole)
    auto = embedder.encode(TEXTS, prompt=PREFIX, precision="auto")
    np.testing.assert_array_equal(auto, half if resolve_precision("auto", "cpu") == "bf16" else whole)


def test_training_mode_is_left_as_it_was(embedder):
    embedder.train()
    embedder.encode(["x"])
    assert embedder.training and embedder.embedding_model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("one string",), "not a list of texts. For a single one write"),
        ((["a", 3],), r"texts\[1\] is int"),
        ((["a", None],), r"texts\[1\] is missing"),
        ((["a", "b"], ["p"]), "2 texts but 1 instructions"),
        ((["a"], [None]), r"instruction\[0\] is NoneType"),
    ],
)
def test_what_is_not_a_list_of_strings_is_refused(arguments, message, make_embedder):
    with pytest.raises(UserError, match=message):
        make_embedder().encode(*arguments)


def test_impossible_arguments_are_refused(make_embedder):
    embedder = make_embedder()
    for dim in (0, 65, -1):
        with pytest.raises(UserError, match="choose 1 to 64"):
            embedder.encode(["a"], dim=dim)
    with pytest.raises(UserError, match="fp16"):
        embedder.encode(["a"], precision="fp16")
    with pytest.raises(UserError, match="the backbone has 4096 positions"):
        make_embedder(text={"max_length": 5000})


def test_instruction_acts_through_attention_only(make_embedder):
    """Its tokens are not pooled, yet the vector changes with it; a causal mean would change as well."""
    embedder = make_embedder(pooling=MeanConfig())
    masked, bare = embedder.encode(["heap overflow"], prompt=PREFIX)[0], embedder.encode(["heap overflow"])[0]
    assert np.linalg.norm(masked - bare) > 1e-2
    inputs = embedder.tokeniser.collate(embedder.tokeniser.encode(["heap overflow"], [PREFIX]))
    with torch.no_grad():
        states = embedder.embedding_model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state[0]
    kept = states[inputs["pool_mask"][0].bool()].mean(0)
    np.testing.assert_allclose(masked, (kept / kept.norm()).numpy(), atol=1e-6)
    assert 0 < inputs["pool_mask"].sum() < inputs["attention_mask"].sum()


def test_causal_and_bidirectional_differ(make_embedder):
    ahead = make_embedder(pooling=MeanConfig()).encode(["how do I sort a list"])
    behind = make_embedder(pooling=MeanConfig(), bidirectional=False).encode(["how do I sort a list"])
    assert np.linalg.norm(ahead - behind) > 1e-2


def test_gradients_flow_through_forward(make_embedder):
    embedder = make_embedder()
    inputs = embedder.tokeniser.collate(embedder.tokeniser.encode(TEXTS[:3], [PREFIX] * 3))
    vectors = embedder(**inputs)
    assert vectors.dtype == torch.float32 and vectors.shape == (3, 64)
    (vectors @ torch.randn(64)).sum().backward()
    assert all(parameter.grad is not None for parameter in embedder.parameters())
