"""Probe texts: a model folder carries their vectors, and loading computes them again.

A library version that reads the folder differently (above all one that silently runs a bidirectional model causal)
is refused instead of giving other vectors.
Shapes: P probes, D width.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from nvembed.core.steps import PROBES_JSON, PROBES_TENSORS
from nvembed.modeling.embedder import Embedder, encode_prompted
from nvembed.modeling.sentence_folder import write_json
from nvembed.text.instructions import instruction_prefix
from nvembed.types import UserError

# Between machines and library versions fp32 vectors differ by about 1e-6; a causal model's are off by more than 0.01.
TOLERANCE = 1e-3

_PROBES = (
    ("The mitochondrion is the powerhouse of the cell.", ""),
    ("how to reverse a list in python", instruction_prefix("web_search")),
    ("Überprüfung: naïve café, 東京 🙂", ""),
    ("word " * 40, instruction_prefix("similar_text")),
    ("", instruction_prefix("web_search")),
)


def write_probes(embedder: Embedder, folder: Path) -> None:
    """Write probe texts (`probes.json`) and their vectors (`probes.safetensors`, `vectors` [P, D])."""
    texts, instructions = [list(column) for column in zip(*_PROBES, strict=True)]
    vectors_PD = encode_prompted(embedder, texts, instructions)
    rows = [{"text": text, "instruction": prefix} for text, prefix in zip(texts, instructions, strict=True)]
    write_json(folder / PROBES_JSON, rows)
    save_file({"vectors": vectors_PD}, folder / PROBES_TENSORS)


def check_probes(embedder: Embedder, folder: Path) -> None:
    """Compute the probe vectors again and compare (Euclidean distance at most `TOLERANCE`).

    Raises:
        UserError: probes are missing or differ; what was measured is in the message.
    """
    try:
        rows = json.loads((folder / PROBES_JSON).read_text(encoding="utf-8"))
        expected_PD = load_file(folder / PROBES_TENSORS)["vectors"]
        texts, instructions = [row["text"] for row in rows], [row["instruction"] for row in rows]
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{folder}: its probe vectors cannot be read ({error}). Copy or build the folder again."
        ) from error
    probe_PD = encode_prompted(embedder, texts, instructions)
    if probe_PD.shape != expected_PD.shape:
        raise UserError(f"{folder}: probe vectors have shape {probe_PD.shape}, {expected_PD.shape} are stored.")
    distance = float(np.linalg.norm(probe_PD - expected_PD, axis=1).max())
    if not distance <= TOLERANCE:
        raise UserError(_explain(embedder, folder, distance))


def _explain(embedder: Embedder, folder: Path, distance: float) -> str:
    import torch
    import transformers

    from nvembed.modeling.bidirectional import attends_ahead

    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if embedder.config.bidirectional and not attends_ahead(embedder.embedding_model):
        cause = f"the model is bidirectional, but {versions} runs it causal. Install transformers >= 5.2"
    else:
        cause = (
            f"this is another model than the one that was saved, or {versions} computes it differently. Compare the "
            "versions with those in nvembed.json, and copy or build the folder again"
        )
    measured = f"distance {distance:.3g}, at most {TOLERANCE}"
    return f"{folder}: its probe texts give other vectors than stored ({measured}): {cause}."
