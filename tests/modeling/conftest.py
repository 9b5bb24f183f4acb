"""Tiny embedders, built in the test process: random decoders with a byte-level BPE learned from a few sentences."""

from collections.abc import Callable

import pytest
import torch

from nvembed.modeling.assemble import build_embedder
from nvembed.modeling.backbones import random_decoder, train_byte_level_bpe
from nvembed.modeling.config import EmbedderConfig, LatentAttentionConfig, RandomBackbone
from nvembed.modeling.embedder import Embedder
from nvembed.text.config import TextConfig

SENTENCES = [
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: how do I sort a list",
    "the weakness that causes a heap overflow in the parser of images",
    "definition of a clinical finding that concerns the nervous system",
] * 3


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    return train_byte_level_bpe(SENTENCES, 400)


@pytest.fixture
def make_embedder(tokenizer) -> Callable[..., Embedder]:
    def make(family="llama", attention="sdpa", seed=0, text=None, num_layers=2, **embedder) -> Embedder:
        backbone = random_decoder(RandomBackbone(family=family, num_layers=num_layers), tokenizer, seed)
        backbone.set_attn_implementation(attention)
        config = EmbedderConfig(
            **{
                "pooling": LatentAttentionConfig(num_latents=16, num_heads=4),
                "text": TextConfig(**{"max_length": 64, **(text or {})}),
                **embedder,
            }
        )
        return build_embedder(backbone, tokenizer, config, seed)

    return make
