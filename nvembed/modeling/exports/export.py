"""`export_model`: one model folder, one form of it, and a record of how far the form's vectors are from the model's.

    export.json    format, form, what it was made from, sizes, parity over probe texts and over the user's texts

A form that is too far off is refused and nothing is left behind; int8 has no limit, its cosine is reported.
"""

from __future__ import annotations

import json
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
from nvembed.modeling.sentence_folder import library_versions, needs_code
from nvembed.types import UserError

__all__ = ["FORMS", "ExportJob", "ParityError", "export_model"]

FORMS = ("sentence-transformers", "onnx", "onnx-int8", "merged", "adapter", "folded", "backbone")
LIMITS = {"onnx": 1e-4}  # onnxruntime has its own kernels; all other forms run the same ones
LIMIT = 1e-5
Written = tuple[Encode | None, dict[str, Any]]
RECORD, FORMAT_VERSION = "export.json", 1


@dataclass(frozen=True)
class ExportJob:
    """What `export_model` is asked for.

    Attributes:
        model: model folder, or an adapter-only export.
        target: new folder.
        form: one of `FORMS`.
        texts: the user's own texts to compare on, as documents.
        base: what an adapter stands on. An adapter written without it is not run, so its record has no parity.
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


def export_model(job: ExportJob) -> dict[str, Any]:
    """Write one form of a model; the content of its `export.json`.

    Raises:
        UserError: an unknown form, a target that exists, a form that this model cannot take.
        ParityError: the form gives other vectors than the model; nothing was written.
    """
    if job.form not in FORMS:
        raise UserError(f"--as {job.form}: choose one of {', '.join(FORMS)}")
    if job.target.exists() and (not job.target.is_dir() or any(job.target.iterdir())):
        raise UserError(f"{job.target} exists and is not empty. Choose another place.")
    source = _open(job)
    before = sum(parameter.numel() for parameter in source.embedder.parameters())
    sets = text_sets(job.model, job.texts)
    expected = reference(source.embedder, sets)
    staging = job.target.absolute().parent / ".tmp" / f"nvembed-export-{job.target.name}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        encode, extra = _write(job, source, staging)
        parity = measure(expected, encode, sets) if encode is not None else {}
        if parity and job.form != "onnx-int8":
            refuse_beyond(parity, LIMITS.get(job.form, LIMIT), f"the {job.form} form")
        record = _record(job, source, staging, parity, {"parameters": {"model": before}, **extra})
        (staging / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if job.target.exists():
            job.target.rmdir()
        os.replace(staging, job.target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if staging.parent.exists() and not any(staging.parent.iterdir()):
            staging.parent.rmdir()
    return record


def _open(job: ExportJob) -> _Source:
    if is_adapter_folder(job.model):
        if job.base is None:
            raise UserError(f"{job.model} is an adapter without its backbone: give the folder it stands on as --base.")
        embedder = load_adapter_folder(job.model, job.base)
        return _Source(embedder, job.model, describe_adapter_folder(job.model)["prompts"], True)
    if job.base is not None and job.form != "adapter":
        raise UserError(f"{job.model} is a whole model; --base is for adapter-only forms.")
    return _Source(load_embedder(job.model), job.model, describe_folder(job.model)["prompts"], False)


def _write(job: ExportJob, source: _Source, folder: Path) -> Written:
    """Write the form; how to embed with what was written, and what else to record."""
    if source.adapter_only and job.form != "merged":
        raise UserError(f"{job.model} is adapter-only: export it --as merged first, and that model --as {job.form}.")
    writers: dict[str, Callable[[ExportJob, _Source, Path], Written]] = {
        "sentence-transformers": _whole,
        "merged": _whole,
        "onnx": _onnx,
        "onnx-int8": _onnx,
        "adapter": _adapter,
        "folded": _folded,
        "backbone": _backbone,
    }
    return writers[job.form](job, source, folder)


def _whole(job: ExportJob, source: _Source, folder: Path) -> Written:
    if source.adapter_only:
        merge_adapter(source.embedder)
        save_embedder(source.embedder, folder, prompts=source.prompts)
    else:  # as it was written: card, recipe and all, but without the adapter that is merged already
        left_out = shutil.ignore_patterns(ADAPTER_FOLDER, RECORD)
        shutil.copytree(source.folder, folder, dirs_exist_ok=True, ignore=left_out)
    code = needs_code(source.embedder.config)
    encode, library = folder_encoder(folder, code=code)
    return encode, {"needs_trust_remote_code": code, "measured_with": library}


def _onnx(job: ExportJob, source: _Source, folder: Path) -> Written:
    embedder = source.embedder
    write_onnx(embedder, folder, int8=job.form == "onnx-int8")
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


def _adapter(job: ExportJob, source: _Source, folder: Path) -> Written:
    base = write_adapter_folder(source.embedder, source.folder, folder)
    tensors = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    again = embedder_encode(load_adapter_folder(folder, job.base)) if job.base is not None else None
    return again, {"base": base, "tensor_bytes": tensors}


def _folded(job: ExportJob, source: _Source, folder: Path) -> Written:
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


def _backbone(job: ExportJob, source: _Source, folder: Path) -> Written:
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
    job: ExportJob, source: _Source, folder: Path, parity: dict[str, Parity], extra: dict[str, Any]
) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        **stamp(FORMAT_VERSION),
        "form": job.form,
        "model": source.folder.absolute().name,
        "bytes": size,
        "parity": {name: found.plain() for name, found in parity.items()},
        "limit": None if job.form == "onnx-int8" else LIMITS.get(job.form, LIMIT),
        **extra,
        "versions": library_versions(),
    }
