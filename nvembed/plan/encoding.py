"""The cost of encoding: sizes of an encoder, operations of a text, seconds of a pool of actors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed.modeling.hub_shapes import hub_shape
from nvembed.plan.hardware import CORE, Hardware
from nvembed.plan.memory import PROCESS_BYTES
from nvembed.plan.sizes import Model
from nvembed.plan.work import compute_seconds, forward_flops
from nvembed.retrieval.config import EncodeConfig, PackageModel, RetrieverConfig
from nvembed.types import UserError

# A packed forward alone reaches this many times the share of the peak that training does. On a core: MiniLM 2.2 on 10 k
# and 2.1 on 100 k short texts through shards (`tests/benchmarks/plan_mining_against_measured.py`), the quickstart's
# teacher 2.1. On a GPU: one H100, networks of 6 x 384 and 28 x 1,024 (`tests/benchmarks/gpu_retrieval.py`); wider ones
# are assumed to.
ENCODE_GAIN = {"cpu": 2.15, "gpu": 1.4}
TOKENISED = 0.4e6  # tokens a second and core (measured: 0.36-0.42 M); an actor tokenises between its forwards
TOKENISERS = {"cpu": 1, "gpu": 8}  # cores of an actor that does so; beside a GPU the tokeniser takes idle ones
TEXT_BYTES = 4.5  # of a token of text: assumed, English
LAUNCHES = 20  # kernels of an encoder layer's forward, counted


@dataclass(frozen=True)
class EncoderSizes:
    """The sizes of an encoder that decide its cost.

    Attributes:
        layers, width, dim: of the network, and of its vectors.
        weights: parameters that every token is multiplied with.
        attention: widths that attention is computed on (heads x width of a head).
        parameters: everything that is loaded, the embedding table included.
        model: one of our own, whose head costs too.
    """

    layers: int
    width: int
    dim: int
    weights: float
    attention: int
    parameters: float
    model: Model | None = None

    @classmethod
    def of(cls, model: Model) -> EncoderSizes:
        """The sizes of an embedder that the recipe trains."""
        shape = model.shape
        weights = float(shape.parameters - shape.embedding_parameters)
        heads = shape.heads * shape.head_dim
        return cls(shape.layers, shape.hidden, shape.hidden, weights, heads, model.parameters, model)

    def flops(self, tokens: float, length: float) -> float:
        """Operations of a forward over `tokens` in texts of `length`."""
        if self.model is not None:
            return forward_flops(self.model, tokens, length)
        return tokens * (2.0 * self.weights + 4.0 * self.layers * length * self.attention)


def encoder_sizes(retriever: RetrieverConfig) -> EncoderSizes | None:
    """Sizes of an off-the-shelf encoder: from its package, its folder, or the table; None where it is not known."""
    try:
        if isinstance(retriever, PackageModel):
            from nvembed.retrieval.encoders import package_folder

            return _read(Path(package_folder(retriever.package)))
        known = hub_shape(retriever.name)
        if known is None:
            return _read(Path(retriever.name)) if Path(retriever.name).is_dir() else None
    except (UserError, StopIteration, OSError, ValueError, KeyError, TypeError):
        return None
    heads, key_values = known.heads * known.head_dim, known.kv_heads * known.head_dim
    layer = 2 * known.hidden * (heads + key_values) + 3 * known.hidden * known.intermediate
    weights = float(known.layers * layer)
    return EncoderSizes(
        known.layers, known.hidden, known.hidden, weights, heads, weights + known.vocab * known.hidden
    )  # fmt: skip


def _read(folder: Path) -> EncoderSizes:
    """From the `config.json` of a transformers folder, which sentence-transformers may have put one deeper."""
    paths = sorted(folder.glob("config.json")) + sorted(folder.glob("**/config.json"))
    configs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    config: dict[str, Any] = next(config for config in configs if "hidden_size" in config)
    hidden, wide, layers = (int(config[key]) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or hidden // heads)
    key_values = int(config.get("num_key_value_heads") or heads)
    gated = 3 if "rms_norm_eps" in config else 2  # decoders of the llama family; BERT has two maps
    weights = float(layers * (2 * hidden * width * (heads + key_values) + gated * hidden * wide))
    parameters = weights + int(config.get("vocab_size", 0)) * hidden
    return EncoderSizes(layers, hidden, hidden, weights, heads * width, parameters)


def on_gpus(gpus_per_actor: float, hardware: Hardware) -> bool:
    """Whether actors with this share of a GPU run on GPUs."""
    return hardware.kind == "gpu" and gpus_per_actor > 0


def busy(actors: int, threads: int, gpus_per_actor: float, hardware: Hardware) -> float:
    """Devices that a pool uses: GPUs, or cores. On a machine with GPUs the number of cores is not bounded."""
    if on_gpus(gpus_per_actor, hardware):
        return min(actors * gpus_per_actor, float(hardware.devices))
    cores = actors * threads
    return float(cores if hardware.kind == "gpu" else min(cores, hardware.devices))


def encode_seconds(
    encoder: EncoderSizes, tokens: float, length: float, config: EncodeConfig, hardware: Hardware
) -> float:
    """Seconds of a pool over `tokens` in texts of `length`, its start apart.

    Actors without a GPU run on cores, on a machine with GPUs too; those are planned as the measured core.
    """
    gpus = on_gpus(config.gpus_per_actor, hardware)
    device = hardware if gpus or hardware.kind == "cpu" else CORE
    count = busy(config.actors, config.threads_per_actor, config.gpus_per_actor, hardware)
    arithmetic = compute_seconds(encoder.flops(tokens, length), count, encoder.width, device) / ENCODE_GAIN[device.kind]
    forwards = tokens / config.token_budget
    launches = forwards * encoder.layers * LAUNCHES * device.launch_seconds / count
    return arithmetic + launches + tokens / (TOKENISED * TOKENISERS[device.kind] * config.actors)


def encode_memory(encoder: EncoderSizes, config: EncodeConfig, length: float) -> float:
    """Bytes of one encoding actor at its peak, on the host: process, weights (bf16 copies), one forward, one shard."""
    forward = config.token_budget * encoder.width * 4.0 * 48  # of MiniLM, 4,096 tokens: measured
    shard = config.shard_rows * (encoder.dim * 4.0 * 3 + length * TEXT_BYTES * 3)
    return PROCESS_BYTES + 4.0 * encoder.parameters + 2.0 * encoder.weights + forward + shard
