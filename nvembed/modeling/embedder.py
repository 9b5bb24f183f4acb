"""The embedder: a decoder without its language-model head, pooling, and unit vectors.

Parameter names are NV-Embed's: `embedding_model.*` and `latent_attention_model.*`.
Shapes: N texts, L tokens, T tokens of a packed row, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from nvembed.core.arguments import check_count, check_list, check_optional_count, public, shown
from nvembed.losses.matryoshka import prefix_rows
from nvembed.modeling.bidirectional import set_bidirectional
from nvembed.modeling.config import HEADS, EmbedderConfig, FoldedLatentAttentionConfig, LastTokenConfig
from nvembed.modeling.latent_attention import FoldedLatentAttention, LatentAttention
from nvembed.modeling.packed import packed_states, packing, packs
from nvembed.modeling.pooling import last_token_pool, mean_pool, normalise
from nvembed.modeling.precision import autocast, resolve_precision
from nvembed.text.batching import packed_chunks, token_budget_chunks
from nvembed.text.identity import check_texts
from nvembed.text.instructions import choose_prompts
from nvembed.text.tokenise import Tokeniser, Tokens
from nvembed.types import UserError

WINDOW_TEXTS = 4096  # tokenised at a time, so that memory does not grow with the number of texts


class Embedder(nn.Module):
    """Texts to unit vectors.

    Args:
        embedding_model: a transformers decoder without head (`LlamaModel`, `MistralModel`, ...), float32. Its config
            is set causal or bidirectional as `config` says.
        tokeniser: made with `config.text`.
        config: pooling, direction, text handling. Latent attention is created with fresh weights.

    Attributes:
        dim: D, width of the vectors.
        prompts: name -> prompt, as the model folder stores them (`prompt_name` of `encode`); empty before.

    Raises:
        UserError: an argument of another type; latent attention whose heads do not divide the width; texts longer than
            the backbone's positions.

    Example:
        >>> from nvembed import load_embedder
        >>> model = load_embedder("model")
        >>> model.encode(["heap overflow", "sort a list"], instruction="web_search").shape == (2, model.dim)
        True
    """

    embedding_model: Any  # a transformers decoder; their types are of no help

    @public
    def __init__(self, embedding_model: nn.Module, tokeniser: Tokeniser, config: EmbedderConfig) -> None:
        _check_parts(embedding_model, tokeniser, config)
        super().__init__()
        self.embedding_model = embedding_model
        self.config = config
        self.tokeniser = tokeniser
        self.prompts: dict[str, str] = {}
        self.dim = int(self.embedding_model.config.hidden_size)
        _check_length(self.embedding_model.config, config.text.max_length, "text.max_length")
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

    def forward_packed(self, tokens: Sequence[Tokens]) -> torch.Tensor:
        """`forward` without padding, float32 [N, D]; equal lengths adjacent. Inside `packing(embedding_model)`."""
        states_TD, layout = packed_states(self.embedding_model, [item.input_ids for item in tokens])
        if self.latent_attention_model is not None:  # it mixes a token with the latents only, not with other tokens
            states_TD = self.latent_attention_model(states_TD.unsqueeze(0)).squeeze(0)
        states_NLD, real_NL = layout.padded(states_TD)
        if isinstance(self.config.pooling, LastTokenConfig):
            return normalise(last_token_pool(states_NLD, real_NL))
        pooled_T = torch.tensor([flag for item in tokens for flag in item.pool_mask], device=states_TD.device)
        return normalise(mean_pool(states_NLD, layout.padded(pooled_T)[0] * real_NL))

    @public
    def encode(
        self,
        texts: Sequence[str],
        instruction: str | Sequence[str] = "",
        *,
        prompt: str | Sequence[str] | None = None,
        prompt_name: str | None = None,
        dim: int | None = None,
        token_budget: int = 4096,
        precision: str = "fp32",
        max_length: int | None = None,
    ) -> np.ndarray:
        """Embed texts, packed where the backbone can (`packed.FAMILIES`), else in windows of similar token length.

        A text's vector does not depend on the other texts beyond float noise. At most one of `instruction`, `prompt`
        and `prompt_name` is given: queries need one, documents of retrieval none.

        Args:
            texts: N strings; may be empty.
            instruction: a task sentence or its key in `text.instructions.CATALOGUE`, for all texts, or one for each;
                "" for none. The prompt is rendered from it.
            prompt: strings put before the texts as they are, one for all, or one for each.
            prompt_name: a name of the model's `prompts`.
            dim: Matryoshka prefix: keep the first `dim` numbers and scale to length 1 again.
            token_budget: tokens of one forward, padding included.
            precision: "fp32", "bf16" (autocast) or "auto".
            max_length: most tokens of a text, BOS/EOS included; None for the model's own.

        Returns:
            float32 [N, dim or D], rows of length 1, in the order of `texts`.

        Raises:
            UserError: not a list; a text that cannot be embedded (not a string, longer than 1 MB, ...); not N
                instructions or prompts; an unknown key or name; a wrong `dim`, length, budget or precision.
        """
        texts = check_texts("encode", check_list("texts", texts, "texts"), allow_empty=True)
        prompts = choose_prompts(len(texts), instruction, prompt, prompt_name, self.prompts)
        if dim is not None and not 1 <= check_count("dim", dim, least=None) <= self.dim:
            raise UserError(f"dim={dim}: this model's vectors have {self.dim} numbers; choose 1 to {self.dim}.")
        matrix_ND = encode_prompted(
            self,
            texts,
            prompts,
            token_budget=check_count("token_budget", token_budget),
            precision=precision,
            max_length=check_optional_count("max_length", max_length),
        )
        return matrix_ND if dim is None else prefix_rows(matrix_ND, dim)

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the pooling; none for mean and last-token pooling."""
        if self.latent_attention_model is None:
            return iter(())
        return self.latent_attention_model.named_parameters(prefix="latent_attention_model")


@torch.inference_mode()
def encode_prompted(
    embedder: Embedder,
    texts: Sequence[str],
    prompts: Sequence[str],
    *,
    token_budget: int = 4096,
    precision: str = "fp32",
    max_length: int | None = None,
    packed: bool = True,
    cut_N: np.ndarray | None = None,
) -> np.ndarray:
    """`Embedder.encode` of N texts and their N prompts as they are: empty texts are embedded too.

    Args:
        packed: False pads the texts also where the backbone can pack them.
        cut_N: int8 [N] that gets 1 where a text had more tokens than `max_length`, else 0.

    Returns:
        float32 [N, D].
    """
    if max_length is not None:
        _check_length(embedder.embedding_model.config, max_length, "max_length", embedder.tokeniser.specials.taken)
    matrix_ND = np.empty((len(texts), embedder.dim), dtype=np.float32)
    resolved = resolve_precision(precision, next(embedder.parameters()).device)
    was_training = embedder.training
    embedder.eval()
    try:
        for start in range(0, len(texts), WINDOW_TEXTS):
            window = slice(start, start + WINDOW_TEXTS)
            tokens = embedder.tokeniser.encode(texts[window], prompts[window], max_length)
            _encode_window(embedder, tokens, token_budget, resolved, packed, matrix_ND[window])
            if cut_N is not None:
                cut_N[window] = [item.cut for item in tokens]
    finally:
        embedder.train(was_training)
    return matrix_ND


def _encode_window(
    embedder: Embedder, tokens: Sequence[Tokens], token_budget: int, precision: str, packed: bool, out_ND: np.ndarray
) -> None:
    device = next(embedder.parameters()).device
    lengths = np.array([len(item.input_ids) for item in tokens], dtype=np.int64)
    without_padding = packed and packs(embedder.embedding_model, int(lengths.max()))
    cut = packed_chunks if without_padding else token_budget_chunks
    with packing(embedder.embedding_model) if without_padding else nullcontext():
        for chunk in cut(lengths, token_budget):
            items = [tokens[index] for index in chunk]
            with autocast(precision, device):
                vector_CD = (
                    embedder.forward_packed(items)
                    if without_padding
                    else embedder(**embedder.tokeniser.collate(items, device=device))
                )
            out_ND[chunk] = vector_CD.cpu().numpy()


def _check_parts(embedding_model: Any, tokeniser: Any, config: Any) -> None:
    for name, value, kind, advice in (
        ("embedding_model", embedding_model, nn.Module, "a transformers decoder without head"),
        ("tokeniser", tokeniser, Tokeniser, "nvembed.text.tokenise.Tokeniser(tokenizer, config.text)"),
        ("config", config, EmbedderConfig, "an nvembed.modeling.config.EmbedderConfig"),
    ):
        if not isinstance(value, kind):
            raise UserError(f"Embedder: {name} is {shown(value)}; give {advice}, or use load_embedder(folder).")


def _check_length(decoder_config: Any, max_length: int, name: str, specials: int = 0) -> None:
    positions = getattr(decoder_config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise UserError(f"{name} is {max_length}, but the backbone has {positions} positions. Choose at most those.")
    if max_length <= specials:
        raise UserError(f"{name} is {max_length}; BOS and EOS take {specials}. Choose {specials + 1} or more.")
