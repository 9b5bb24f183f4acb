"""NV-Embed-v1/v2-shaped checkpoints as model folders.

    config.json                 model_type nvembed; text_config (a Mistral's), latent_attention_config
    *.safetensors               embedding_model.*, latent_attention_model.*; with an index where there are several
    tokenizer.json, tokenizer_config.json

Sizes come from the config, with the published defaults (512 latents, 8 heads, every width 4,096) where it is silent.
The published forward has no sliding window, so the model folder has none. Pickled weights are not read.
Facts: modeling_nvembed.py and configuration_nvembed.py of the published model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from nvembed.modeling.assemble import build_embedder
from nvembed.modeling.config import EmbedderConfig, LatentAttentionConfig
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.folder import save_embedder
from nvembed.modeling.origin import UNKNOWN, card_facts
from nvembed.text.config import TextConfig
from nvembed.text.instructions import CATALOGUE, instruction_prefix
from nvembed.types import UserError

FAMILIES = ("mistral", "llama", "qwen2", "qwen3")
_DEFAULT_WIDTH = 4096  # of hidden_dim, latent_dim and cross_dim_head in the published configuration
_SHOWN = 8
# Of a decoder's config what says how it was saved, not what it is.
_NOT_SIZES = (
    "model_type",
    "architectures",
    "_name_or_path",
    "auto_map",
    "torch_dtype",
    "dtype",
    "transformers_version",
)


def import_nv_embed(source: Path, target: Path, *, max_length: int = 4096) -> dict[str, Any]:
    """Read a checkpoint and write a model folder.

    Returns:
        `parameters`, `dim`, `embedder` (as a recipe writes it) and `recipe`, the section that trains on from it.

    Raises:
        UserError: a folder of another kind, sizes that do not fit, missing or unknown weights (listed).
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty. Choose another place.")
    config = _read_json(source / "config.json")
    if "latent_attention_config" not in config or "text_config" not in config:
        raise UserError(
            f"{source / 'config.json'} is not NV-Embed's: it has no text_config and latent_attention_config. "
            "Other models start as initialise.backbone: {type: pretrained, name: FOLDER}."
        )
    embedder = load_nv_embed(source, config, max_length)
    prompts = {key: instruction_prefix(key) for key in CATALOGUE}
    card = (
        "Imported from a checkpoint in NV-Embed's layout. NV-Embed-v1 and v2 are licensed CC-BY-NC-4.0 by their maker."
    )
    save_embedder(embedder, target, prompts=prompts, card=card, licences=[_licence(source)])
    described = embedder.config.model_dump(mode="json")
    section = {"initialise": {"backbone": {"type": "nvembed", "name": str(target)}, "embedder": described}}
    return {
        "parameters": sum(parameter.numel() for parameter in embedder.parameters()),
        "dim": embedder.dim,
        "embedder": described,
        "recipe": yaml.safe_dump(section, sort_keys=False, allow_unicode=True),
    }


def _licence(source: Path) -> dict[str, str]:
    """Licence on the checkpoint's own card; never guessed from the layout."""
    card = card_facts(source)
    name, licence = card.get("base_model"), card.get("license")
    return {
        "kind": "backbone",
        "name": name if isinstance(name, str) else source.absolute().name,
        "licence": licence if isinstance(licence, str) else UNKNOWN,
    }


def load_nv_embed(source: Path, config: Mapping[str, Any], max_length: int) -> Embedder:
    """The embedder of a checkpoint: float32, evaluation mode."""
    backbone = _decoder(config["text_config"], source)
    text = TextConfig(
        max_length=min(max_length, int(backbone.config.max_position_embeddings)),
        add_bos=True,
        add_eos=bool(config.get("add_eos", True)),
        mask_instruction=bool(config.get("is_mask_instruction", True)),
    )
    pooling = _pooling(config["latent_attention_config"], backbone.config.hidden_size, source)
    bidirectional = config.get("mask_type", "b") == "b"
    settings = EmbedderConfig(bidirectional=bidirectional, pooling=pooling, text=text)
    embedder = build_embedder(backbone, _tokenizer(source), settings, seed=0)
    _load(embedder, source)
    return embedder


def _decoder(section: Mapping[str, Any], source: Path) -> Any:
    from transformers import CONFIG_MAPPING, AutoModel

    kind = str(section.get("model_type", "bidir_mistral"))
    family = kind.removeprefix("bidir_")
    if family not in FAMILIES:
        raise UserError(f"{source}: text_config.model_type {kind!r} is not known; known: {', '.join(FAMILIES)}.")
    sizes = {key: value for key, value in section.items() if key not in _NOT_SIZES}
    try:
        decoder_config = CONFIG_MAPPING[family](**{**sizes, "sliding_window": None})
        with torch.random.fork_rng(devices=[]):
            model = AutoModel.from_config(decoder_config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: text_config cannot be built ({error}).") from error
    return model.float().eval()


def _pooling(section: Mapping[str, Any], hidden: int, source: Path) -> LatentAttentionConfig:
    widths = {key: int(section.get(key, _DEFAULT_WIDTH)) for key in ("hidden_dim", "latent_dim")}
    if set(widths.values()) != {hidden}:
        listed = ", ".join(f"{key} {value}" for key, value in widths.items())
        raise UserError(f"{source}: latent_attention_config says {listed}, but the decoder's hidden_size is {hidden}.")
    if not section.get("output_normalize", True):
        raise UserError(
            f"{source}: latent_attention_config.output_normalize is false; nvembed's vectors have length 1."
        )
    try:
        return LatentAttentionConfig(
            num_latents=section.get("num_latents_value", 512),
            num_heads=section.get("num_cross_heads", 8),
            head_dim=section.get("cross_dim_head", _DEFAULT_WIDTH),
            mlp_ratio=section.get("mult", 4),
        )
    except ValidationError as error:
        raise UserError(f"{source}: latent_attention_config: {error}") from error


def _tokenizer(source: Path) -> Any:
    """The fast tokenizer; padding by EOS where none is named, as published."""
    from transformers import PreTrainedTokenizerFast

    if not (source / "tokenizer.json").is_file():
        raise UserError(f"{source} has no tokenizer.json. Convert its tokenizer to a fast one first.")
    settings = _read_json(source / "tokenizer_config.json")
    names = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(name)
        names[name] = value.get("content") if isinstance(value, Mapping) else value
    names["pad_token"] = names["pad_token"] or names["eos_token"]
    given = {name: token for name, token in names.items() if token is not None}
    return PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), **given)


@torch.no_grad()
def _load(embedder: Embedder, source: Path) -> None:
    """Copy every tensor of the checkpoint; none may be missing or left over."""
    wanted = dict(embedder.state_dict(keep_vars=True))
    where = {name: file for file in _weight_files(source) for name in _names(file)}
    problems = [f"missing: {name}" for name in sorted(set(wanted) - set(where))]
    problems += [f"unknown: {name}" for name in sorted(set(where) - set(wanted))]
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise UserError(
            f"{source}: its weights are not NV-Embed's, {len(problems)} do not fit:\n  "
            + "\n  ".join(problems[:_SHOWN])
            + more
        )
    for file in sorted(set(where.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                tensor, place = tensors.get_tensor(name), wanted[name]
                if tensor.shape != place.shape:
                    raise UserError(
                        f"{source}: {name} has shape {list(tensor.shape)}, the config says {list(place.shape)}."
                    )
                place.copy_(tensor)


def _weight_files(source: Path) -> list[Path]:
    index = source / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        if bad := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index} names files outside the folder: {', '.join(bad)}.")
        files = [source / name for name in names]
    else:
        files = sorted(source.glob("model*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        problem = (
            f"lacks {', '.join(missing)}" if missing else "has no model.safetensors (pickled weights are not read)"
        )
        raise UserError(f"{source} {problem}. Download it whole.")
    return files


def _names(file: Path) -> Iterator[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield from tensors.keys()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}). Download it again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object.")
    return config
