"""Adapters: what is trained, and that merging changes layers but not vectors."""

import numpy as np
import pytest
import torch

from nvembed.modeling.adapters import apply_adapter, has_adapter, merge_adapter
from nvembed.modeling.config import FullConfig, LoraConfig, MeanConfig
from nvembed.modeling.folder import load_embedder, save_embedder
from nvembed.types import UserError

TEXTS = ["how do I sort a list", "heap overflow"]


def trained(embedder):
    return {name for name, parameter in embedder.named_parameters() if parameter.requires_grad}


def disturb(embedder):
    """Stand in for training: B starts at zero, which would hide a wrong merge."""
    torch.manual_seed(1)
    for name, parameter in embedder.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)


def test_lora_trains_its_layers_and_the_pooling(make_embedder):
    embedder = make_embedder()
    head = {name for name, _ in embedder.head_parameters()}
    apply_adapter(embedder, LoraConfig(r=4, alpha=8))
    names = trained(embedder)
    assert head <= names and len(head) == 14
    lora = names - head
    assert all("lora_" in name for name in lora)
    assert len(lora) == 2 * 7 * 2  # layers, linears, A and B
    assert has_adapter(embedder)


def test_a_fresh_adapter_changes_nothing_and_is_seeded(make_embedder):
    first, second = make_embedder(), make_embedder()
    before = first.encode(TEXTS)
    for embedder in (first, second):
        torch.manual_seed(3)
        apply_adapter(embedder, LoraConfig(r=4, dropout=0.1))
    np.testing.assert_array_equal(first.encode(TEXTS), before)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_merging_keeps_the_vectors_and_restores_plain_layers(make_embedder, tmp_path):
    embedder = make_embedder()
    keys, before = set(embedder.state_dict()), embedder.encode(TEXTS)
    apply_adapter(embedder, LoraConfig(r=4, alpha=8))
    disturb(embedder)
    adapted = embedder.encode(TEXTS)
    assert np.linalg.norm(adapted - before, axis=1).min() > 1e-2
    with pytest.raises(ValueError, match="merge_adapter"):
        save_embedder(embedder, tmp_path / "model")
    merge_adapter(embedder)
    assert not has_adapter(embedder) and set(embedder.state_dict()) == keys
    np.testing.assert_allclose(embedder.encode(TEXTS), adapted, atol=1e-5)
    save_embedder(embedder, tmp_path / "model")
    assert not any("adapter" in path.name for path in (tmp_path / "model").iterdir())
    np.testing.assert_allclose(load_embedder(tmp_path / "model").encode(TEXTS), adapted, atol=1e-5)


def test_a_second_adapter_after_merging(make_embedder):
    embedder = make_embedder()
    apply_adapter(embedder, LoraConfig(r=4))
    with pytest.raises(UserError, match="already"):
        apply_adapter(embedder, LoraConfig(r=4))
    merge_adapter(embedder)
    apply_adapter(embedder, LoraConfig(r=2))
    assert {parameter.shape[0] for name, parameter in embedder.named_parameters() if "lora_A" in name} == {2}


def test_unknown_target_modules_are_named(make_embedder):
    with pytest.raises(UserError, match=r"no linear layer query_proj\. It has: down_proj, .*q_proj"):
        apply_adapter(make_embedder(), LoraConfig(target_modules=("q_proj", "query_proj")))


@pytest.mark.parametrize("freeze", [True, False])
def test_full_fine_tuning(freeze, make_embedder):
    embedder = make_embedder()
    apply_adapter(embedder, FullConfig(freeze_embeddings=freeze))
    frozen = {name for name, _ in embedder.named_parameters()} - trained(embedder)
    assert frozen == ({"embedding_model.embed_tokens.weight"} if freeze else set())
    before = embedder.encode(TEXTS)
    merge_adapter(embedder)
    np.testing.assert_array_equal(embedder.encode(TEXTS), before)


def test_mean_pooling_has_no_head(make_embedder):
    embedder = make_embedder(pooling=MeanConfig())
    apply_adapter(embedder, LoraConfig(r=2))
    assert list(embedder.head_parameters()) == []
    assert all("lora_" in name for name in trained(embedder))
