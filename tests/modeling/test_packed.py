"""Packed rows give what padded batches give, for every family of the table; the switch leaves the model as it was."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from nvembed.modeling import packed as module
from nvembed.modeling.bidirectional import set_bidirectional
from nvembed.modeling.config import EmbedderConfig
from nvembed.modeling.packed import FAMILIES, Layout, packed_states, packing, packs
from nvembed.modeling.precision import autocast
from nvembed.text.batching import packed_chunks

LENGTHS = (23, 9, 9, 9, 4, 1)  # runs of one and of several, and a text of one token
DECODERS = ("llama", "mistral", "qwen2", "qwen3")


def tiny(family, **changes):
    """A random two-layer model of a family; decoders with fewer key heads than query heads."""
    if family in DECODERS:
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64}
        sizes |= {"intermediate_size": 96, "num_hidden_layers": 2}
    elif family == "distilbert":
        sizes = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        family, vocab_size=200, max_position_embeddings=64, pad_token_id=1, **{**sizes, **changes}
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    for parameter in model.parameters():  # as initialised, positions and attention hardly matter
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model


def texts(lengths=LENGTHS):
    generator = np.random.default_rng(1)
    return [generator.integers(5, 200, size=length).tolist() for length in lengths]


@torch.inference_mode()
def both_ways(model, precision="fp32"):
    """(packed, padded) states of every text."""
    rows = texts()
    width = max(LENGTHS)
    ids = torch.tensor([row + [1] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with autocast(precision):
        padded_NLD = model(input_ids=ids, attention_mask=mask).last_hidden_state
        with packing(model):
            states_TD, layout = packed_states(model, rows)
    found = [text for run in layout.batches(states_TD) for text in run]
    return found, [padded_NLD[index, :length] for index, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_equals_padded(family, bidirectional):
    model = tiny(family)
    if family in DECODERS:
        set_bidirectional(model, bidirectional)
    elif not bidirectional:
        return  # encoders have one direction
    assert packs(model, max(LENGTHS))
    for found, expected in zip(*both_ways(model), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    exact = [state.clone() for state in both_ways(model)[1]]
    for found, expected, reference in zip(*both_ways(model, "bf16"), exact, strict=True):
        # both round to 8 bits at other places: the packed error is of the padded one's size
        size = (expected.float() - reference).norm()
        assert (found.float() - reference).norm() <= 1.5 * size + 1e-3 * reference.norm()
    assert model.config._attn_implementation == "sdpa"


def test_a_text_sees_itself_only():
    model = tiny("llama")
    set_bidirectional(model, True)
    rows = texts()
    changed = [*rows[:2], [7] * 9, *rows[3:]]
    with torch.inference_mode(), packing(model):
        (first, _), (second, layout) = (packed_states(model, item) for item in (rows, changed))
    start = LENGTHS[0] + LENGTHS[1]
    same = torch.ones(len(first), dtype=torch.bool)
    same[start : start + 9] = False
    torch.testing.assert_close(first[same], second[same], atol=0, rtol=0)
    assert (first[~same] - second[~same]).abs().max() > 0.1
    assert layout.runs == ((0, 1, 23), (23, 3, 9), (50, 1, 4), (54, 1, 1))


def test_what_falls_back():
    window = tiny("mistral", sliding_window=8)
    assert packs(window, 8) and not packs(window, 9)
    assert not packs(tiny("bert").train(), 4)
    assert not packs(tiny("bert", is_decoder=True), 4)
    eager = tiny("bert")
    eager.set_attn_implementation("eager")
    assert not packs(eager, 4)
    mpnet = AutoConfig.for_model("mpnet", vocab_size=200, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    assert not packs(AutoModel.from_config(mpnet).eval(), 4)


def test_the_switch_is_undone_and_nothing_else_gets_through():
    model = tiny("bert")
    with pytest.raises(AssertionError, match="packed_states"), packing(model):
        model(input_ids=torch.tensor([[5, 6]]))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("pooling", ["mean", "last_token", "latent_attention"])
def test_pooling_and_the_instruction_mask(pooling, monkeypatch):
    from nvembed.modeling.assemble import build_embedder
    from nvembed.modeling.backbones import load_backbone
    from nvembed.modeling.config import RandomBackbone

    words = [f"{verb} {noun}" for verb in ("find", "open", "close") for noun in ("buffer", "overflow", "session")] * 9
    options = {"num_latents": 8, "num_heads": 2} if pooling == "latent_attention" else {}
    config = EmbedderConfig.model_validate({"pooling": {"type": pooling, **options}})
    embedder = build_embedder(*load_backbone(RandomBackbone(vocab_size=300), words, 0), config, 0)
    batch = ["open session", "buffer " * 30, "x", "open session", ""]
    instructions = ["Instruct: find\nQuery: ", "", "Instruct: find\nQuery: ", "", ""]
    assert packs(embedder.embedding_model, 40)
    found = embedder.encode(batch, prompt=instructions, token_budget=64)
    monkeypatch.setattr("nvembed.modeling.embedder.packs", lambda model, longest: False)
    np.testing.assert_allclose(found, embedder.encode(batch, prompt=instructions, token_budget=64), atol=1e-5)
    assert np.abs(found[0] - found[3]).max() > 1e-3  # the instruction acts


@given(st.lists(st.integers(1, 40), max_size=50), st.integers(1, 100))
def test_packed_chunks(lengths, budget):
    chunks = packed_chunks(np.array(lengths, dtype=np.int64), budget)
    assert sorted(index for chunk in chunks for index in chunk) == list(range(len(lengths)))
    order = [lengths[index] for chunk in chunks for index in chunk]
    assert order == sorted(order, reverse=True)
    sums = [sum(lengths[index] for index in chunk) for chunk in chunks]
    assert all(total <= budget or len(chunk) == 1 for total, chunk in zip(sums, chunks, strict=True))
    for total, following in itertools.pairwise(chunks):  # greedy: the next text would not have fitted
        assert sum(lengths[index] for index in total) + lengths[following[0]] > budget
    layout = Layout.of([lengths[index] for chunk in chunks for index in chunk])
    assert sum(count * length for _, count, length in layout.runs) == sum(lengths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_variable_length_kernel(family):
    model = tiny(family).to("cuda")
    rows = texts()
    with torch.inference_mode(), packing(model):
        expected, _ = packed_states(model, rows)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert module._varlen_type(torch.empty(1, 1, 16, device="cuda")) is torch.bfloat16
            found, _ = packed_states(model, rows)
    assert (found.float() - expected).norm() <= 0.05 * expected.norm()
