"""`export_model` writes one form of a model folder, and records how far the form's vectors are from the model's.

    export.json    format, form, source model, sizes, parity over probe texts and over the user's texts

A form that is too far off is refused and nothing is left behind; int8 has no limit, its cosine is reported.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed.core.formats import stamp
from nvembed.core.runtime import no_progress_bars
from nvembed.modeling.adapters import ADAPTER_FOLDER, merge_adapter
from nvembed.modeling.config import LatentAttentionConfig
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.exports.adapter_folder import (
    describe_adapter_folder,
    is_adapter_folder,
    load_adapter_folder,
    write_adapter_folder,
)
from nvembed.modeling.exports.backbone_folder import write_backbone
from nvembed.modeling.exports.folding import fold_embedder
from nvembed.modeling.exports.onnx_graph import ONNX_FILE, onnx_encode, open_session, write_onnx
from nvembed.modeling.exports.parity import (
    Encode,
    Parity,
    ParityError,
    embedder_encode,
    measure,
    reference,
    refuse_beyond,
    text_sets,
)
from nvembed.modeling.exports.stock import folder_encoder
from nvembed.modeling.folder import describe_folder, load_embedder, save_embedder
from nvembed.modeling.sentence_folder import library_versions, needs_code, write_json
from nvembed.types import UserError

__all__ = ["FORMS", "ExportSpec", "ParityError", "export_model"]

FORMS = ("sentence-transformers", "onnx", "onnx-int8", "merged", "adapter", "folded", "backbone")
LIMITS = {"onnx": 1e-4}  # onnxruntime has its own kernels; all other forms run the same ones
LIMIT = 1e-5
Written = tuple[Encode | None, dict[str, Any]]
RECORD, FORMAT_VERSION = "export.json", 1


@dataclass(frozen=True)
class ExportSpec:
    """Arguments of `export_model`.

    Attributes:
        model: model folder, or an adapter-only export.
        target: new folder.
        form: one of `FORMS`.
        texts: the user's own texts to compare on, as documents.
        base: the base of an adapter. An adapter written without it is not run, so its record has no parity.
    """

    model: Path
    target: Path
    form: str
    texts: tuple[str, ...] = ()
    base: Path | None = None


@dataclass
class _Source:
    embedder: Embedder
    folder: Path
    prompts: dict[str, str]
    adapter_only: bool


def export_model(spec: ExportSpec) -> dict[str, Any]:
    """Write one form of a model; the content of its `export.json`.

    Raises:
        UserError: an unknown form, a target that exists, a form that this model cannot take.
        ParityError: the form gives other vectors than the model; nothing was written.
    """
    if spec.form not in FORMS:
        raise UserError(f"--as {spec.form}: choose one of {', '.join(FORMS)}")
    if spec.target.exists() and (not spec.target.is_dir() or any(spec.target.iterdir())):
        raise UserError(f"{spec.target} exists and is not empty. Choose another place.")
    source = _open(spec)
    before = sum(parameter.numel() for parameter in source.embedder.parameters())
    sets = text_sets(spec.model, spec.texts)
    expected = reference(source.embedder, sets)
    staging = spec.target.absolute().parent / ".tmp" / f"nvembed-export-{spec.target.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        encode, extra = _write(spec, source, staging)
        parity = measure(expected, encode, sets) if encode is not None else {}
        if parity and spec.form != "onnx-int8":
            refuse_beyond(parity, LIMITS.get(spec.form, LIMIT), f"the {spec.form} form")
        record = _record(spec, source, staging, parity, {"parameters": {"model": before}, **extra})
        write_json(staging / RECORD, record)
        if spec.target.exists():
            spec.target.rmdir()
        os.replace(staging, spec.target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if staging.parent.exists() and not any(staging.parent.iterdir()):
            staging.parent.rmdir()
    return record


def _open(spec: ExportSpec) -> _Source:
    if is_adapter_folder(spec.model):
        if spec.base is None:
            raise UserError(f"{spec.model} is an adapter without its backbone: give its base folder as --base.")
        embedder = load_adapter_folder(spec.model, spec.base)
        return _Source(embedder, spec.model, describe_adapter_folder(spec.model)["prompts"], True)
    if spec.base is not None and spec.form != "adapter":
        raise UserError(f"{spec.model} is a whole model; --base is for adapter-only forms.")
    return _Source(load_embedder(spec.model), spec.model, describe_folder(spec.model)["prompts"], False)


def _write(spec: ExportSpec, source: _Source, folder: Path) -> Written:
    """Write the form; returns how to embed with it, and more fields of the record."""
    if source.adapter_only and spec.form != "merged":
        raise UserError(f"{spec.model} is adapter-only: export it --as merged first, and that model --as {spec.form}.")
    writers: dict[str, Callable[[ExportSpec, _Source, Path], Written]] = {
        "sentence-transformers": _whole,
        "merged": _whole,
        "onnx": _onnx,
        "onnx-int8": _onnx,
        "adapter": _adapter,
        "folded": _folded,
        "backbone": _backbone,
    }
    return writers[spec.form](spec, source, folder)


def _whole(spec: ExportSpec, source: _Source, folder: Path) -> Written:
    if source.adapter_only:
        merge_adapter(source.embedder)
        save_embedder(source.embedder, folder, prompts=source.prompts)
    else:  # as it was written: card, recipe and all, but without the adapter that is merged already
        left_out = shutil.ignore_patterns(ADAPTER_FOLDER, RECORD)
        shutil.copytree(source.folder, folder, dirs_exist_ok=True, ignore=left_out)
    code = needs_code(source.embedder.config)
    encode, library = folder_encoder(folder, code=code)
    return encode, {"needs_trust_remote_code": code, "measured_with": library}


def _onnx(spec: ExportSpec, source: _Source, folder: Path) -> Written:
    embedder = source.embedder
    write_onnx(embedder, folder, int8=spec.form == "onnx-int8")
    embedder.tokeniser.tokenizer.save_pretrained(folder)
    embedder.embedding_model.config.save_pretrained(folder)
    session = open_session(folder / ONNX_FILE)
    extra = {
        "prompts": source.prompts,
        "inputs": {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]},
        "outputs": {
            "last_hidden_state": ["batch", "sequence", embedder.dim],
            "sentence_embedding": ["batch", embedder.dim],
        },
        "max_length": embedder.config.text.max_length,
        "model_bytes": (folder / ONNX_FILE).stat().st_size,
    }
    return lambda texts, instructions: onnx_encode(embedder, session, texts, instructions), extra


def _adapter(spec: ExportSpec, source: _Source, folder: Path) -> Written:
    base = write_adapter_folder(source.embedder, source.folder, folder)
    tensors = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    again = embedder_encode(load_adapter_folder(folder, spec.base)) if spec.base is not None else None
    return again, {"base": base, "tensor_bytes": tensors}


def _folded(spec: ExportSpec, source: _Source, folder: Path) -> Written:
    folded = fold_embedder(source.embedder)
    pooling = source.embedder.config.pooling
    assert isinstance(pooling, LatentAttentionConfig)
    save_embedder(folded, folder, prompts=source.prompts, card="Latent attention folded for inference.")
    heads = {
        name: sum(parameter.numel() for _, parameter in embedder.head_parameters())
        for name, embedder in (("before", source.embedder), ("after", folded))
    }
    encode, library = folder_encoder(folder, code=True)
    return encode, {"head_parameters": heads, "measured_with": library}


def _backbone(spec: ExportSpec, source: _Source, folder: Path) -> Written:
    from transformers import AutoModel

    embedder = source.embedder
    write_backbone(embedder, folder, source.prompts)
    with no_progress_bars():
        backbone = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    again = Embedder(backbone, embedder.tokeniser, embedder.config)
    again.latent_attention_model = embedder.latent_attention_model
    extra = {
        "architecture": type(embedder.embedding_model).__name__,
        "is_causal": not embedder.config.bidirectional,
        "head_included": embedder.latent_attention_model is None,
        "servers": "loaded with plain transformers; vLLM and TEI were not run",
    }
    return embedder_encode(again.eval()), extra


def _record(
    spec: ExportSpec, source: _Source, folder: Path, parity: dict[str, Parity], extra: dict[str, Any]
) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        **stamp(FORMAT_VERSION),
        "form": spec.form,
        "model": source.folder.absolute().name,
        "bytes": size,
        "parity": {name: differences.plain() for name, differences in parity.items()},
        "limit": None if spec.form == "onnx-int8" else LIMITS.get(spec.form, LIMIT),
        **extra,
        "versions": library_versions(),
    }
