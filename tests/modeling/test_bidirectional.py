"""The attention switch: what a token's state depends on, in every family, under sdpa and eager, padded or not."""

import pytest
import torch

from nvembed.modeling.backbones import random_decoder
from nvembed.modeling.bidirectional import attends_ahead, set_bidirectional
from nvembed.modeling.config import RandomBackbone

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
ROWS = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 8, 10]])


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=["sdpa", "eager"])
def attention(request):
    return request.param


def decoder(family, attention, tokenizer):
    model = random_decoder(RandomBackbone(family=family), tokenizer, 0)
    model.set_attn_implementation(attention)
    return model


@torch.no_grad()
def states(model, ids, padding=0):
    mask = torch.ones_like(ids)
    if padding:
        ids = torch.nn.functional.pad(ids, (0, padding), value=3)
        mask = torch.nn.functional.pad(mask, (0, padding))
    return model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, : ids.shape[1] - padding]


@pytest.mark.parametrize("padding", [0, 3])
def test_a_later_token_changes_earlier_states(family, attention, padding, tokenizer):
    model = decoder(family, attention, tokenizer)
    set_bidirectional(model, True)
    a, b = (states(model, row[None], padding)[0] for row in ROWS)
    assert (a - b)[:4].norm(dim=1).min() > 1e-3 * a.norm(dim=1).mean()
    assert attends_ahead(model)


@pytest.mark.parametrize("padding", [0, 3])
def test_a_causal_model_does_not_look_ahead(family, attention, padding, tokenizer):
    model = decoder(family, attention, tokenizer)
    set_bidirectional(model, True)
    set_bidirectional(model, False)
    assert "is_causal" not in model.config.to_dict()
    a, b = (states(model, row[None], padding)[0] for row in ROWS)
    assert torch.equal(a[:4], b[:4]) and not torch.equal(a[4], b[4])
    assert not attends_ahead(model)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_padding_changes_nothing(family, attention, bidirectional, tokenizer):
    model = decoder(family, attention, tokenizer)
    set_bidirectional(model, bidirectional)
    alone = states(model, ROWS)
    assert (states(model, ROWS, padding=4) - alone).abs().max() < 1e-5
    short = torch.tensor([[5, 6, 7]])
    mixed = torch.tensor([[5, 6, 7, 3, 3], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        padded = model(input_ids=mixed, attention_mask=mask, use_cache=False).last_hidden_state
    assert (padded[:1, :3] - states(model, short)).abs().max() < 1e-5
    assert (padded[1] - alone[0]).abs().max() < 1e-5


def test_windowed_attention_is_bidirectional_within_the_window(attention, tokenizer):
    model = random_decoder(RandomBackbone(family="mistral", num_layers=1), tokenizer, 0)
    model.set_attn_implementation(attention)
    model.config.sliding_window = 3
    set_bidirectional(model, True)
    ids = torch.arange(5, 21)[None]
    changed = ids.clone()
    changed[0, -1] = 30
    difference = (states(model, ids) - states(model, changed))[0].abs().amax(dim=1)
    reached = torch.nonzero(difference > 0).flatten().tolist()
    assert 14 in reached and min(reached) >= 12  # the last of 16 tokens reaches its neighbours, not the whole text


def test_a_library_that_obeys_only_without_padding_is_found_out(tokenizer):
    model = decoder("llama", "sdpa", tokenizer)
    for layer in model.layers:  # the wrong switch: sdpa then runs unpadded batches bidirectional, padded ones causal
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="bidirectional without padding and causal with it"):
        attends_ahead(model)


def test_the_switch_is_saved_and_read_again(tokenizer, tmp_path):
    from transformers import AutoModel

    model = decoder("mistral", "sdpa", tokenizer)
    set_bidirectional(model, True)
    model.save_pretrained(tmp_path)
    assert attends_ahead(AutoModel.from_pretrained(tmp_path))
