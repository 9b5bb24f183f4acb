"""Adapters: LoRA layers or the whole backbone are trained, and always the whole pooling.

LoRA layers are injected into the backbone in place (no wrapper), so the embedder stays what it is; `merge_adapter`
turns them back into plain layers. A model folder has the adapter that was merged into it, in PEFT's layout:

    adapter/adapter_model.safetensors, adapter_config.json    LoRA's A and B, and how they were injected
    adapter/base.json                                         name of the base, and the hash of its weights
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from nvembed.core.formats import check_format, stamp
from nvembed.modeling.config import AdapterConfig, FoldedLatentAttentionConfig, LoraConfig
from nvembed.modeling.embedder import Embedder
from nvembed.types import UserError


def apply_adapter(embedder: Embedder, config: AdapterConfig) -> None:
    """Inject LoRA layers where configured, and set which parameters are trained, in place.

    LoRA's A is drawn from torch's global random state: seed it first.

    Raises:
        UserError: the backbone lacks a LoRA target module, or has LoRA layers already; a folded head.
    """
    if has_adapter(embedder):
        raise UserError("the embedder carries LoRA layers already; merge them first (merge_adapter).")
    if isinstance(embedder.config.pooling, FoldedLatentAttentionConfig):
        raise UserError("this model's latent attention was folded for inference. Train the model it was exported from.")
    backbone = embedder.embedding_model
    if isinstance(config, LoraConfig):
        _inject_lora(backbone, config)
    else:
        backbone.requires_grad_(True)
        if config.freeze_embeddings:
            backbone.get_input_embeddings().requires_grad_(False)
    for _, parameter in embedder.head_parameters():
        parameter.requires_grad_(True)


def _inject_lora(backbone: Any, config: LoraConfig) -> None:
    import peft

    known = {name.rsplit(".", 1)[-1] for name, module in backbone.named_modules() if isinstance(module, nn.Linear)}
    missing = [name for name in config.target_modules if name not in known]
    if missing:
        raise UserError(
            f"adapter.target_modules: {type(backbone).__name__} has no linear layer {', '.join(missing)}. "
            f"It has: {', '.join(sorted(known))}."
        )
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules),
            bias="none",
        ),
        backbone,
    )
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)


def has_adapter(embedder: Embedder) -> bool:
    """Whether LoRA layers are in the backbone."""
    return any(_is_lora(module) for module in embedder.embedding_model.modules())


def merge_adapter(embedder: Embedder) -> None:
    """Fold LoRA layers into the weights, in place; nothing happens without them.

    Raises:
        ValueError: a merged weight would not be finite.
    """
    backbone = embedder.embedding_model
    for name, module in list(backbone.named_modules()):
        if _is_lora(module):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, module.get_base_layer())
    # PEFT leaves its configuration on the model, which save_pretrained would take for an adapter to be saved.
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        backbone.__dict__.pop(leftover, None)


ADAPTER_FOLDER = "adapter"
ADAPTER_TENSORS, ADAPTER_CONFIG, ADAPTER_BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"
ADAPTER_FORMAT = 1
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class KeptAdapter:
    """LoRA layers apart from the weights they were merged into.

    Attributes:
        tensors: PEFT's name -> A or B, float32.
        config: PEFT's `adapter_config.json`.
        base: `name` and `weights_xxh3_128` of the backbone they were trained on.
    """

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    base: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write the three files into a new folder."""
        folder.mkdir(parents=True)
        save_file(self.tensors, folder / ADAPTER_TENSORS, metadata={"format": "pt"})
        for name, value in (
            (ADAPTER_CONFIG, self.config),
            (ADAPTER_BASE, {**stamp(ADAPTER_FORMAT), "base": self.base}),
        ):
            (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def keep_adapter(embedder: Embedder, base: Path, name: str) -> KeptAdapter | None:
    """The LoRA layers of an embedder that are not merged yet; None without any.

    Args:
        base: folder of the backbone they were injected into.
        name: its name in `base.json`.
    """
    if not has_adapter(embedder):
        return None
    backbone = embedder.embedding_model
    plain = backbone.peft_config["default"].to_dict()
    # Sets come in any order, and paths of the machine do not belong in a file that travels.
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in plain.items()}
    config |= {"base_model_name_or_path": name, "inference_mode": True, "peft_type": "LORA", "task_type": None}
    tensors = {
        _PEFT_PREFIX + key.replace(".default.", "."): value.detach().float().cpu().contiguous().clone()
        for key, value in backbone.state_dict().items()
        if "lora_" in key
    }
    return KeptAdapter(tensors, config, {"name": name, "weights_xxh3_128": weights_hash(base)})


def read_adapter(folder: Path) -> KeptAdapter:
    """The adapter files of a folder.

    Raises:
        UserError: none there, damaged, or of a format this nvembed does not read.
    """
    try:
        record = json.loads((folder / ADAPTER_BASE).read_text(encoding="utf-8"))
        check_format(record, str(folder / ADAPTER_BASE), newest=ADAPTER_FORMAT)
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return KeptAdapter(load_file(folder / ADAPTER_TENSORS), config, record["base"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder}: its adapter cannot be read ({error}).") from error


@torch.no_grad()
def put_adapter(backbone: Any, adapter: KeptAdapter) -> None:
    """Inject a stored adapter into its base, in place.

    Raises:
        UserError: its tensors do not fit.
    """
    import peft

    config = adapter.config
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config["lora_dropout"],
            target_modules=list(config["target_modules"]),
            bias="none",
        ),
        backbone,
    )
    wanted = {_PEFT_PREFIX + key.replace(".default.", "."): key for key in backbone.state_dict() if "lora_" in key}
    if set(wanted) != set(adapter.tensors):
        odd = sorted(set(wanted) ^ set(adapter.tensors))
        raise UserError(f"the adapter does not fit this backbone; missing or unknown: {', '.join(odd[:8])}")
    state = {wanted[name]: tensor for name, tensor in adapter.tensors.items()}
    try:
        backbone.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"the adapter does not fit this backbone: {error}") from error


def weights_hash(folder: Path) -> str:
    """xxh3-128 over name, type, shape and bytes of a backbone's tensors, whatever files they are divided into.

    Raises:
        UserError: no `model*.safetensors` there.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no model*.safetensors; give the model folder that the adapter was trained on.")
    digest = xxhash.xxh3_128()
    names: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names |= dict.fromkeys(tensors.keys(), file)
    for name in sorted(names):
        with safe_open(names[name], framework="pt") as tensors:
            tensor = tensors.get_tensor(name).contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A")  # not by class: importing peft takes seconds, and loads deepspeed
