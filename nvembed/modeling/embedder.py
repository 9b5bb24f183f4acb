"""The embedder: a decoder without its language-model head, pooling, and unit vectors.

Parameter names are NV-Embed's: `embedding_model.*` and `latent_attention_model.*`.
Shapes: N texts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from nvembed.modeling.bidirectional import set_bidirectional
from nvembed.modeling.config import HEADS, EmbedderConfig, FoldedLatentAttentionConfig, LastTokenConfig
from nvembed.modeling.latent_attention import FoldedLatentAttention, LatentAttention
from nvembed.modeling.pooling import last_token_pool, mean_pool, normalise
from nvembed.modeling.precision import autocast, resolve_precision
from nvembed.storage import UserError
from nvembed.text.batching import token_budget_chunks
from nvembed.text.tokenise import Tokeniser


class Embedder(nn.Module):
    """Texts to unit vectors.

    Args:
        embedding_model: a transformers decoder without head (`LlamaModel`, `MistralModel`, ...), float32. Its config
            is set causal or bidirectional as `config` says.
        tokeniser: made with `config.text`.
        config: pooling, direction, text handling. Latent attention is created with fresh weights.

    Attributes:
        dim: D, width of the vectors.

    Raises:
        UserError: latent attention whose heads do not divide the width; texts longer than the backbone's positions.
    """

    embedding_model: Any  # a transformers decoder; their types say little

    def __init__(self, embedding_model: nn.Module, tokeniser: Tokeniser, config: EmbedderConfig) -> None:
        super().__init__()
        self.embedding_model = embedding_model
        self.config = config
        self.tokeniser = tokeniser
        self.dim = int(self.embedding_model.config.hidden_size)
        _check_length(self.embedding_model.config, config)
        set_bidirectional(self.embedding_model, config.bidirectional)
        self.latent_attention_model: LatentAttention | FoldedLatentAttention | None = None
        if isinstance(config.pooling, HEADS):
            folded = isinstance(config.pooling, FoldedLatentAttentionConfig)
            make = FoldedLatentAttention if folded else LatentAttention
            try:
                head = make(self.dim, **config.pooling.model_dump(exclude={"type"}))
                self.latent_attention_model = head.to(next(embedding_model.parameters()).device)
            except ValueError as error:
                raise UserError(str(error)) from error

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pool_mask: torch.Tensor) -> torch.Tensor:
        """Unit vectors, float32 [N, D], from right-padded [N, L] tensors as `Tokeniser.collate` makes them."""
        states_NLD = self.embedding_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        if self.latent_attention_model is not None:
            states_NLD = self.latent_attention_model(states_NLD)
        if isinstance(self.config.pooling, LastTokenConfig):
            return normalise(last_token_pool(states_NLD, attention_mask))
        return normalise(mean_pool(states_NLD, pool_mask))

    @torch.inference_mode()
    def encode(
        self,
        texts: Sequence[str],
        instruction: str | Sequence[str] = "",
        *,
        dim: int | None = None,
        token_budget: int = 4096,
        precision: str = "fp32",
    ) -> np.ndarray:
        """Embed texts, in windows of similar token length.

        A text's vector does not depend on the other texts beyond float noise.

        Args:
            texts: N strings; may be empty.
            instruction: a full prefix ("Instruct: ...\\nQuery: ") for all texts, or one for each; "" for documents.
            dim: Matryoshka prefix: keep the first `dim` numbers and scale to length 1 again.
            token_budget: tokens of one forward, padding included.
            precision: "fp32", "bf16" (autocast) or "auto".

        Returns:
            float32 [N, dim or D], rows of length 1, in the order of `texts`.

        Raises:
            UserError: something that is not a string, a number of instructions other than N, an impossible `dim`.
        """
        texts, instructions = _checked(texts, instruction)
        if dim is not None and not 1 <= dim <= self.dim:
            raise UserError(f"dim={dim}: this model's vectors have {self.dim} numbers; choose 1 to {self.dim}.")
        matrix_ND = np.empty((len(texts), self.dim), dtype=np.float32)
        if not texts:
            return matrix_ND[:, :dim]
        device = next(self.parameters()).device
        resolved = resolve_precision(precision, device)
        tokens = self.tokeniser.encode(texts, instructions)
        lengths = np.array([len(item.input_ids) for item in tokens], dtype=np.int64)
        was_training = self.training
        self.eval()
        try:
            for chunk in token_budget_chunks(lengths, token_budget):
                inputs = self.tokeniser.collate([tokens[index] for index in chunk], device=device)
                with autocast(resolved, device):
                    vector_CD = self(**inputs)
                matrix_ND[chunk] = vector_CD.cpu().numpy()
        finally:
            self.train(was_training)
        return matrix_ND if dim is None else _matryoshka_prefix(matrix_ND, dim)

    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the decoder."""
        return self.embedding_model.named_parameters(prefix="embedding_model")

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the pooling; none for mean and last-token pooling."""
        if self.latent_attention_model is None:
            return iter(())
        return self.latent_attention_model.named_parameters(prefix="latent_attention_model")


def _check_length(decoder_config: Any, config: EmbedderConfig) -> None:
    positions = getattr(decoder_config, "max_position_embeddings", None)
    if positions is not None and config.text.max_length > positions:
        raise UserError(f"text.max_length is {config.text.max_length}, but the backbone has {positions} positions.")


def _checked(texts: Sequence[str], instruction: str | Sequence[str]) -> tuple[list[str], list[str]]:
    if isinstance(texts, str):
        raise UserError("encode takes a list of texts, not one string: write encode([text]).")
    texts = list(texts)
    instructions = [instruction] * len(texts) if isinstance(instruction, str) else list(instruction)
    if len(instructions) != len(texts):
        raise UserError(f"encode: {len(texts)} texts but {len(instructions)} instructions; give one, or one for each.")
    for name, values in (("texts", texts), ("instruction", instructions)):
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise UserError(f"encode: {name}[{index}] is {type(value).__name__}, not a string: {value!r:.80}")
    return texts, instructions


def _matryoshka_prefix(matrix_ND: np.ndarray, dim: int) -> np.ndarray:
    prefix = matrix_ND[:, :dim]
    norm = np.linalg.norm(prefix, axis=1, keepdims=True)
    return np.ascontiguousarray(prefix / np.maximum(norm, np.finfo(np.float32).tiny), dtype=np.float32)
