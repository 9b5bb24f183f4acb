"""The adapter-only form: LoRA layers in PEFT's layout, the head and the model's description, without the backbone.

    adapter_model.safetensors, adapter_config.json, base.json    as in a model folder's `adapter/`
    head/model.safetensors    latent attention, where the model has it
    adapter.json              format, `embedder`, `prompts`; its presence makes the folder one of these
    probes.json, probes.safetensors

The base is named and its weights' hash is checked when the model is put together again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nvembed.core.formats import check_format, stamp
from nvembed.core.runtime import no_progress_bars
from nvembed.core.steps import PROBES_JSON, PROBES_TENSORS
from nvembed.modeling import probes
from nvembed.modeling.adapters import (
    ADAPTER_BASE,
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_TENSORS,
    put_adapter,
    read_adapter,
    weights_hash,
)
from nvembed.modeling.config import EmbedderConfig
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.exports.backbone_folder import HEAD_FILE
from nvembed.modeling.folder import describe_folder
from nvembed.modeling.sentence_folder import write_json
from nvembed.text.tokenise import Tokeniser
from nvembed.types import UserError

DESCRIPTION = "adapter.json"
FORMAT_VERSION = 1


def write_adapter_folder(embedder: Embedder, source: Path, folder: Path) -> dict[str, str]:
    """Write the adapter-only form of a model folder; returns its base (`name`, `weights_xxh3_128`).

    Raises:
        UserError: the model has no adapter: not trained with LoRA, or by an nvembed that only merged it.
    """
    if not (source / ADAPTER_FOLDER / ADAPTER_BASE).is_file():
        raise UserError(
            f"{source} has no adapter: it was not trained with LoRA (adapter: {{type: lora}}), or by an nvembed that "
            "only merged it. Train the stage again to have one, or export the merged form."
        )
    adapter = read_adapter(source / ADAPTER_FOLDER)
    for name in (ADAPTER_TENSORS, ADAPTER_CONFIG, ADAPTER_BASE):
        shutil.copy(source / ADAPTER_FOLDER / name, folder / name)
    for name in (PROBES_JSON, PROBES_TENSORS):
        shutil.copy(source / name, folder / name)
    if embedder.latent_attention_model is not None:
        (folder / "head").mkdir()
        state = embedder.latent_attention_model.state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / HEAD_FILE)
    described = describe_folder(source)
    record = {**stamp(FORMAT_VERSION), **{key: described[key] for key in ("embedder", "dim", "prompts")}}
    write_json(folder / DESCRIPTION, record)
    return adapter.base


def is_adapter_folder(folder: Path) -> bool:
    """Whether `load_adapter_folder` is for this folder."""
    return (folder / DESCRIPTION).is_file()


def describe_adapter_folder(folder: Path) -> dict[str, Any]:
    """Contents of `adapter.json`: `embedder`, `dim`, `prompts`.

    Raises:
        UserError: not readable, or of a format this nvembed does not read.
    """
    try:
        record: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        check_format(record, str(folder / DESCRIPTION), newest=FORMAT_VERSION)
    except UserError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / DESCRIPTION} cannot be read ({error}). Export the adapter again.") from error
    return record


def load_adapter_folder(folder: Path, base: Path) -> Embedder:
    """The model: base, LoRA layers (not merged) and head; float32, evaluation mode.

    Args:
        folder: an adapter-only export.
        base: the model folder (or plain backbone folder with tokenizer) it was trained on.

    Raises:
        UserError: the base's weights are others than those it was trained on, or a file does not fit.
    """
    from transformers import AutoModel, AutoTokenizer

    adapter = read_adapter(folder)
    base_hash = weights_hash(base)
    if base_hash != adapter.base["weights_xxh3_128"]:
        raise UserError(
            f"{base} is not the base of this adapter: weights {base_hash}, but it was trained on "
            f"{adapter.base['name']} with {adapter.base['weights_xxh3_128']}. Give that folder as --base."
        )
    config = EmbedderConfig.model_validate(describe_adapter_folder(folder)["embedder"])
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with no_progress_bars():
        backbone = AutoModel.from_pretrained(base, dtype=torch.float32, use_safetensors=True, **options)
    tokenizer: Any = AutoTokenizer.from_pretrained(base, **options)
    put_adapter(backbone, adapter)
    embedder = Embedder(backbone, Tokeniser(tokenizer, config.text), config).eval()
    if embedder.latent_attention_model is not None:
        try:
            embedder.latent_attention_model.load_state_dict(load_file(folder / HEAD_FILE))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: its head cannot be loaded ({error}). Export the adapter again.") from error
    probes.check_probes(embedder, folder)
    return embedder
