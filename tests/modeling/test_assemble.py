"""Embedders from a backbone and a fresh head."""

import pytest

from nvembed.modeling.assemble import build_embedder
from nvembed.modeling.backbones import random_decoder
from nvembed.modeling.config import EmbedderConfig, MeanConfig, RandomBackbone
from nvembed.types import UserError


def test_a_library_without_the_switch_is_refused_before_training(tokenizer, monkeypatch):
    backbone = random_decoder(RandomBackbone(), tokenizer, 0)
    monkeypatch.setattr("nvembed.modeling.embedder.set_bidirectional", lambda model, bidirectional: None)
    with pytest.raises(UserError, match=r"bidirectional is true, but LlamaModel does not follow"):
        build_embedder(backbone, tokenizer, EmbedderConfig(pooling=MeanConfig()), 0)
