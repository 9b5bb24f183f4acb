"""Sizes of a backbone before anything heavy is loaded: from the recipe, a `config.json`, a GGUF header.

Used by the recipe's cross-checks and the plan. What cannot be known without a download is None; the sizes of the common
families on the hub are known (`hub_shapes.py`).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open

from nvembed.core.steps import PROBES_TENSORS
from nvembed.modeling.config import (
    BackboneConfig,
    FolderBackbone,
    GgufBackbone,
    NvembedBackbone,
    PoolingConfig,
    RandomBackbone,
)
from nvembed.modeling.hub_shapes import hub_shape


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; `layers` after the recipe's truncation, `layers_available` before it."""

    layers: int
    layers_available: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    family: str = "llama"

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear maps of one layer, by the names LoRA targets."""
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embeddings."""
        return self.vocab * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer: its linear maps, two norms, and what its family adds."""
        maps = self.linears
        extra = sum(maps[name][1] for name in ("q_proj", "k_proj", "v_proj")) if self.family == "qwen2" else 0
        extra += 2 * self.head_dim if self.family == "qwen3" else 0
        return sum(inputs * outputs for inputs, outputs in maps.values()) + 2 * self.hidden + extra

    @property
    def parameters(self) -> int:
        """Weights of the decoder without an lm_head."""
        return self.embedding_parameters + self.layers * self.layer_parameters + self.hidden


def pooling_parameters(pooling: PoolingConfig, hidden: int) -> int:
    """Weights of the pooling head; latent attention after the key/shape table of NV-Embed's code."""
    if pooling.type not in ("latent_attention", "folded_latent_attention"):
        return 0
    wide = pooling.mlp_ratio * hidden
    feed_forward = hidden * 2 * wide + 2 * wide + wide * hidden + hidden
    if pooling.type == "folded_latent_attention":
        return 2 * pooling.num_heads * pooling.num_latents * hidden + 2 * 2 * hidden + feed_forward
    inner = pooling.num_heads * (pooling.head_dim or hidden // pooling.num_heads)
    attention = hidden * inner + hidden * 2 * inner + inner * hidden
    return pooling.num_latents * hidden + attention + 3 * 2 * hidden + feed_forward


def known_shape(backbone: BackboneConfig) -> Shape | None:
    """The backbone's sizes, or None when they are not known here (not installed, on a hub, another format)."""
    if isinstance(backbone, RandomBackbone):
        return Shape(
            layers=backbone.num_layers,
            layers_available=backbone.num_layers,
            hidden=backbone.hidden_size,
            intermediate=backbone.intermediate_size,
            heads=backbone.num_heads,
            kv_heads=backbone.num_key_value_heads,
            head_dim=backbone.hidden_size // backbone.num_heads,
            vocab=backbone.vocab_size,
            family=backbone.family,
        )
    available = _gguf_shape(backbone) if isinstance(backbone, GgufBackbone) else _folder_shape(backbone)
    if available is None or backbone.num_layers is None:
        return available
    return replace(available, layers=min(backbone.num_layers, available.layers_available))


def _folder_shape(backbone: FolderBackbone | NvembedBackbone) -> Shape | None:
    shape = _config_shape(Path(backbone.name) / "config.json")
    if isinstance(backbone, NvembedBackbone):
        return shape
    for path in () if shape else _cached_configs(backbone):
        shape = shape or _config_shape(path)
    known = hub_shape(backbone.name)
    if shape is not None or known is None:
        return shape
    return Shape(layers_available=known.layers, **known._asdict())


def _cached_configs(backbone: FolderBackbone) -> list[Path]:
    """`config.json` of a hub name in the local hub cache: of the requested revision, else of any, newest first."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    folder = cache / f"models--{backbone.name.replace('/', '--')}" / "snapshots"
    configs = sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path for path in configs if backbone.revision in (None, path.parent.name)] or configs


def _config_shape(path: Path) -> Shape | None:
    try:
        config = json.loads(path.read_text())
        heads = config["num_attention_heads"]
        return Shape(
            layers=config["num_hidden_layers"],
            layers_available=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            family=str(config.get("model_type", "llama")),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _gguf_shape(backbone: GgufBackbone) -> Shape | None:
    try:
        path = Path(str(importlib.metadata.distribution(backbone.package).locate_file(backbone.file)))
        header = read_gguf_header(path)
        family = header["general.architecture"]
        sizes = {key.removeprefix(f"{family}."): value for key, value in header.items()}
        heads = int(sizes["attention.head_count"])
        return Shape(
            layers=int(sizes["block_count"]),
            layers_available=int(sizes["block_count"]),
            hidden=int(sizes["embedding_length"]),
            intermediate=int(sizes["feed_forward_length"]),
            heads=heads,
            kv_heads=int(sizes.get("attention.head_count_kv", heads)),
            head_dim=int(sizes.get("attention.key_length", sizes["embedding_length"] // heads)),
            vocab=int(sizes["vocab_size"]),
            family=str(family),
        )
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError, KeyError, TypeError, struct.error):
        return None


_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def read_gguf_header(path: Path) -> dict[str, Any]:
    """Scalar metadata of a GGUF file up to the tokenizer's arrays (2 s with the gguf package, which parses those too).

    Raises:
        ValueError: not a GGUF file of version 2 or 3.
    """
    with open(path, "rb") as file:
        magic, version, _, count = struct.unpack("<4sIQQ", file.read(24))
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path} is not a GGUF file of version 2 or 3")
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = _text(file)
            if key.startswith("tokenizer."):
                break
            metadata[key] = _value(file, struct.unpack("<I", file.read(4))[0])
        return metadata


def _text(file: BinaryIO) -> str:
    return file.read(struct.unpack("<Q", file.read(8))[0]).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        item, length = struct.unpack("<IQ", file.read(12))
        return [_value(file, item) for _ in range(length)]
    if kind not in _SCALARS:
        raise ValueError(f"unknown GGUF value type {kind}")
    return struct.unpack(_SCALARS[kind], file.read(struct.calcsize(_SCALARS[kind])))[0]


def folder_size(folder: Path) -> dict[str, int]:
    """Parameters in, and bytes of, a model folder's weights (`*.safetensors` at any depth, probe vectors left out)."""
    files = [path for path in sorted(folder.rglob("*.safetensors")) if path.name != PROBES_TENSORS]
    parameters = 0
    for path in files:
        with safe_open(path, framework="numpy") as weights:
            parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return {"parameters": parameters, "bytes": sum(path.stat().st_size for path in files)}
