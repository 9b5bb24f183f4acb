"""`nvembed embed`: a file of texts in, a file of vectors out, block by block.

The whole input is checked before the model is loaded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nvembed.core import storage
from nvembed.retrieval import text_file, vector_file
from nvembed.retrieval.text_file import TextFile, check_rows, file_suffix, iter_rows
from nvembed.retrieval.vector_file import publish_file, vector_writer
from nvembed.text.instructions import instruction_prefix, named_prompt
from nvembed.types import UserError

if TYPE_CHECKING:
    from nvembed.retrieval.cache import VectorCache
    from nvembed.retrieval.encoders import Encoder
    from nvembed.retrieval.rows import Encoded

BLOCK_ROWS = 2048
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class ModelOptions:
    """A model and how its vectors are computed, as the commands `embed` and `search` take it.

    Attributes:
        folder: model folder, or folder or hub name of a sentence-transformers model.
        instruction: task sentence or its key, for queries; None for documents.
        prompt_name: a prompt that the model folder stores, instead.
        dim: Matryoshka prefix, None for the full width.
        batch_tokens: tokens of one forward, padding included.
        precision: "fp32", "bf16" or "auto".
        threads: torch threads, None for torch's own choice.
    """

    folder: str
    instruction: str | None = None
    prompt_name: str | None = None
    dim: int | None = None
    batch_tokens: int = 4096
    precision: str = "fp32"
    threads: int | None = None

    def prompt(self) -> str:
        """The prompt of queries; "" without instruction and prompt name.

        Raises:
            UserError: an unknown key or name.
        """
        if self.prompt_name is not None:
            return named_prompt(stored_prompts(self.folder), self.prompt_name)
        return "" if self.instruction is None else instruction_prefix(self.instruction)

    def open(self) -> Encoder:
        """The encoder, on a GPU where there is one."""
        import torch

        from nvembed.retrieval.encoders import as_model_config, open_encoder

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = as_model_config(self.folder, with_prompt=bool(self.prompt()))
        return open_encoder(model, self.threads, self.precision, token_budget=self.batch_tokens, device=device)

    def width(self, encoder: Encoder) -> int:
        """Width of the vectors, the Matryoshka prefix where one is set.

        Raises:
            UserError: the model's vectors are narrower.
        """
        dim = encoder.dim if self.dim is None else self.dim
        if not 1 <= dim <= encoder.dim:
            raise UserError(f"--dim {dim}: this model's vectors have {encoder.dim} numbers; choose 1 to {encoder.dim}.")
        return dim


@dataclass(frozen=True)
class EmbedRequest:
    """The work of `write_vectors`.

    Attributes:
        target: parquet or npy; any URI.
        force: replace an existing target.
        cache: directory (any URI) of vectors of earlier runs; texts that it holds are not embedded again.
    """

    model: ModelOptions
    texts: TextFile
    target: str
    force: bool = False
    cache: str | None = None


@dataclass(frozen=True)
class Written:
    """Result of `write_vectors`.

    Attributes:
        rows, dim: shape of the vectors.
        truncated: texts with more tokens than `max_length`, of which the first were embedded.
    """

    rows: int
    dim: int
    truncated: int
    max_length: int


def write_vectors(request: EmbedRequest, report_progress: Callable[[str], None]) -> Written:
    """Embed a file.

    Raises:
        UserError: bad rows (with their lines), an unknown format, an existing target, an impossible `dim`, an unknown
            instruction or prompt name.
    """
    prompt = request.model.prompt()
    file_suffix(request.texts.uri, text_file.SUFFIXES, "input")
    target_kind = file_suffix(request.target, vector_file.SUFFIXES, "output")
    if storage.exists(request.target) and not request.force:
        raise UserError(f"{request.target} exists. Choose another --out, or give --force to replace it.")
    total = check_rows(request.texts)
    encoder = request.model.open()
    cache = _cache(request, encoder, prompt)
    dim = request.model.width(encoder)
    with publish_file(request.target) as file, closing(vector_writer(target_kind, file, total, dim)) as writer:
        started = reported = time.monotonic()
        done = truncated = 0
        rows = iter_rows(request.texts)
        while block := list(islice(rows, BLOCK_ROWS)):
            ids, texts = zip(*block, strict=True)
            encoded = _encoded(request, encoder, cache, prompt, ids, texts)
            writer.write(ids, cut(encoded.matrix_AD, dim))
            truncated += int((encoded.cut_A == 1).sum())
            done += len(block)
            if (now := time.monotonic()) - reported >= _PROGRESS_SECONDS:
                reported, rate = now, done / (now - started)
                report_progress(f"{done:,} of {total:,} texts, {rate:,.0f}/s, {(total - done) / rate:,.0f} s left")
    if cache is not None:
        cache.settle()
    return Written(total, dim, truncated, encoder.max_length)


def cut(matrix_ND: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` columns, rows scaled to length 1 again: float32 [N, dim]; the matrix itself at its full width."""
    from nvembed.losses.matryoshka import prefix_rows

    return matrix_ND if dim == matrix_ND.shape[1] else prefix_rows(matrix_ND, dim)


def stored_prompts(folder: str) -> dict[str, str]:
    """The prompts by name that a model folder stores for sentence-transformers; none where it stores none."""
    path = Path(folder) / "config_sentence_transformers.json"
    try:
        prompts: dict[str, str] = json.loads(path.read_text(encoding="utf-8")).get("prompts", {})
    except (OSError, ValueError):
        return {}
    return prompts


def _cache(request: EmbedRequest, encoder: Encoder, prompt: str) -> VectorCache | None:
    from nvembed.retrieval.encode_list import open_cache
    from nvembed.retrieval.encoders import as_model_config

    if request.cache is None:
        return None
    return open_cache(request.cache, as_model_config(request.model.folder, with_prompt=bool(prompt)), encoder.precision)


def _encoded(
    request: EmbedRequest,
    encoder: Encoder,
    cache: VectorCache | None,
    prompt: str,
    ids: Sequence[str],
    texts: Sequence[str],
) -> Encoded:
    """Vectors of a block, none of them missing.

    Raises:
        UserError: a vector is not finite (the texts were checked before the model was loaded).
    """
    from nvembed.retrieval.rows import encode_checked

    encoded = encode_checked(encoder, texts, [prompt] * len(texts), cache=cache)
    if encoded.rejected:
        place, problem = next(iter(encoded.rejected.items()))
        raise UserError(f"{request.texts.uri}: text {ids[place]!r} {problem}. Try --precision fp32.")
    return encoded
