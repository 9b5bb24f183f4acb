"""Encoding with a model folder through sentence-transformers.

A module of its own: the one place that may pass `trust_remote_code` (tests/test_layers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nvembed.core.runtime import no_progress_bars
from nvembed.modeling.exports.parity import Encode, embedder_encode
from nvembed.modeling.folder import load_embedder
from nvembed.modeling.sentence_folder import runs_only_our_code


def folder_encoder(folder: Path, *, code: bool) -> tuple[Encode, str]:
    """How to embed with a folder, and which library does it.

    Code of a folder is only run where it is our own; a folder with other code, such as an older nvembed's, is run by
    nvembed, which runs none.
    """
    if code and not runs_only_our_code(folder):
        return embedder_encode(load_embedder(folder)), "nvembed"
    from sentence_transformers import SentenceTransformer

    with no_progress_bars():
        model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=code, local_files_only=True)

    def encode(texts: Sequence[str], instructions: Sequence[str]) -> np.ndarray:
        vectors_ND = np.empty((len(texts), int(model.get_embedding_dimension() or 0)), dtype=np.float32)
        for prompt in sorted(set(instructions)):
            rows = [row for row, instruction in enumerate(instructions) if instruction == prompt]
            given = [texts[row] for row in rows]
            vectors_ND[rows] = model.encode(given, prompt=prompt or None, show_progress_bar=False)
        return vectors_ND

    return encode, "sentence-transformers"
