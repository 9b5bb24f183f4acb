"""Embedders put together: fresh from a backbone, continued from a model folder, or cut to the first layers."""

from __future__ import annotations

import json
from typing import Any

import torch

from nvembed.core.steps import differences
from nvembed.modeling.backbones import keep_first_layers
from nvembed.modeling.bidirectional import attends_ahead
from nvembed.modeling.config import (
    EmbedderConfig,
    FoldedLatentAttentionConfig,
    MeanConfig,
    NvembedBackbone,
)
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.folder import describe_folder, load_embedder
from nvembed.text.tokenise import Tokeniser
from nvembed.types import UserError


def build_embedder(backbone: Any, tokenizer: Any, config: EmbedderConfig, seed: int) -> Embedder:
    """An embedder with fresh pooling; the same seed gives the same weights, whatever was drawn before.

    Raises:
        UserError: the tokenizer lacks a special token, or the backbone does not obey the attention switch.
    """
    if isinstance(config.pooling, FoldedLatentAttentionConfig):
        raise UserError("embedder.pooling: folded_latent_attention is made from a trained model (nvembed export).")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedder = Embedder(backbone, Tokeniser(tokenizer, config.text), config).eval()
    try:
        ahead = attends_ahead(backbone)
    except ValueError as error:
        raise UserError(str(error)) from error
    if ahead != config.bidirectional:
        raise UserError(
            f"embedder.bidirectional is {str(config.bidirectional).lower()}, but {type(backbone).__name__} does not "
            "follow: the installed transformers has no such switch for it. Llama, Mistral, Qwen2 and Qwen3 have it."
        )
    return embedder


def continue_embedder(backbone: NvembedBackbone, config: EmbedderConfig) -> Embedder:
    """The model of a finished folder, head included, to be trained on.

    Raises:
        UserError: no model folder there, or one whose embedder is another than the recipe's.
    """
    if backbone.name.startswith("models:/"):
        raise UserError(f"initialise.backbone.name: {backbone.name!r} must be a folder; copy the model version to one.")
    stored = EmbedderConfig.model_validate(describe_folder(backbone.name)["embedder"])
    text = stored.text.model_copy(update={"max_length": config.text.max_length})
    wanted = stored.model_copy(update={"text": text})
    if changes := differences(wanted.model_dump(mode="json"), config.model_dump(mode="json")):
        listed = "\n  ".join(changes)
        raise UserError(
            f"initialise.embedder is not that of {backbone.name} (folder -> recipe):\n  {listed}\n"
            f"Write the folder's own: {json.dumps(wanted.model_dump(mode='json'))}"
        )
    embedder = load_embedder(backbone.name)
    if wanted == stored:
        return embedder
    longer = Embedder(embedder.embedding_model, Tokeniser(embedder.tokeniser.tokenizer, text), wanted).eval()
    longer.latent_attention_model = embedder.latent_attention_model
    return longer


def truncate_embedder(embedder: Embedder, num_layers: int) -> Embedder:
    """A student: the teacher's first layers and final norm, mean pooled over everything, the same tokenizer.

    The backbone's layers are shared with `embedder`, which is cut too.

    Raises:
        UserError: not fewer layers than the teacher has.
    """
    total = len(embedder.embedding_model.layers)
    if num_layers >= total:
        raise UserError(f"student.init.num_layers is {num_layers}; it must be less than the teacher's {total} layers.")
    keep_first_layers(embedder.embedding_model, num_layers)
    text = embedder.config.text.model_copy(update={"mask_instruction": False})
    config = embedder.config.model_copy(update={"pooling": MeanConfig(), "text": text})
    return Embedder(embedder.embedding_model, Tokeniser(embedder.tokeniser.tokenizer, text), config).eval()
