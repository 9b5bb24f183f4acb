"""What is trained: LoRA or the whole backbone, and always the pooling in full.

LoRA layers are injected into the backbone in place (no wrapper), so the embedder stays what it is; `merge_adapter`
turns them back into plain layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nvembed.modeling.config import AdapterConfig, FoldedLatentAttentionConfig, LoraConfig
from nvembed.modeling.embedder import Embedder
from nvembed.storage import UserError


def apply_adapter(embedder: Embedder, config: AdapterConfig) -> None:
    """Set what is trained, in place.

    LoRA's A is drawn from torch's global random state: seed it first.

    Raises:
        UserError: the backbone has none of a LoRA target module, or is adapted already; a folded head.
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


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A")  # not by class: importing peft takes seconds, and loads deepspeed
