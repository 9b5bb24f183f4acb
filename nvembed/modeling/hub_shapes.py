"""Sizes of decoders on the Hugging Face hub, so that a plan needs no download. Data only.

Each line: layers, hidden, intermediate, heads, key/value heads, width of a head, vocabulary; then the family. The test
adds them up to the sizes their makers publish. A name that is not here needs a local copy (folder or hub cache).
"""

from __future__ import annotations

from typing import NamedTuple


class HubShape(NamedTuple):
    """Sizes of one decoder; `family` says which extra weights it has (qwen2: biases; qwen3: norms of query and key)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    family: str


HUB_SHAPES = {
    "mistralai/Mistral-7B-v0.1": HubShape(32, 4096, 14336, 32, 8, 128, 32000, "mistral"),
    "mistralai/Mistral-7B-v0.3": HubShape(32, 4096, 14336, 32, 8, 128, 32768, "mistral"),
    "mistralai/Mistral-Nemo-Base-2407": HubShape(40, 5120, 14336, 32, 8, 128, 131072, "mistral"),
    "Qwen/Qwen3-0.6B": HubShape(28, 1024, 3072, 16, 8, 128, 151936, "qwen3"),
    "Qwen/Qwen3-1.7B": HubShape(28, 2048, 6144, 16, 8, 128, 151936, "qwen3"),
    "Qwen/Qwen3-4B": HubShape(36, 2560, 9728, 32, 8, 128, 151936, "qwen3"),
    "Qwen/Qwen3-8B": HubShape(36, 4096, 12288, 32, 8, 128, 151936, "qwen3"),
    "Qwen/Qwen3-14B": HubShape(40, 5120, 17408, 40, 8, 128, 151936, "qwen3"),
    "Qwen/Qwen3-32B": HubShape(64, 5120, 25600, 64, 8, 128, 151936, "qwen3"),
    "Qwen/Qwen2.5-0.5B": HubShape(24, 896, 4864, 14, 2, 64, 151936, "qwen2"),
    "Qwen/Qwen2.5-1.5B": HubShape(28, 1536, 8960, 12, 2, 128, 151936, "qwen2"),
    "Qwen/Qwen2.5-3B": HubShape(36, 2048, 11008, 16, 2, 128, 151936, "qwen2"),
    "Qwen/Qwen2.5-7B": HubShape(28, 3584, 18944, 28, 4, 128, 152064, "qwen2"),
    "meta-llama/Llama-2-7b-hf": HubShape(32, 4096, 11008, 32, 32, 128, 32000, "llama"),
    "meta-llama/Llama-3.1-8B": HubShape(32, 4096, 14336, 32, 8, 128, 128256, "llama"),
    "meta-llama/Llama-3.1-70B": HubShape(80, 8192, 28672, 64, 8, 128, 128256, "llama"),
    "meta-llama/Llama-3.2-1B": HubShape(16, 2048, 8192, 32, 8, 64, 128256, "llama"),
    "meta-llama/Llama-3.2-3B": HubShape(28, 3072, 8192, 24, 8, 128, 128256, "llama"),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": HubShape(22, 2048, 5632, 32, 4, 64, 32000, "llama"),
    "HuggingFaceTB/SmolLM2-135M": HubShape(30, 576, 1536, 9, 3, 64, 49152, "llama"),
    "HuggingFaceTB/SmolLM2-360M": HubShape(32, 960, 2560, 15, 5, 64, 49152, "llama"),
    "HuggingFaceTB/SmolLM2-1.7B": HubShape(24, 2048, 8192, 32, 32, 64, 49152, "llama"),
}
# Made from the same decoder: other weights, equal sizes.
_SAME = {
    "mistralai/Mistral-7B-Instruct-v0.2": "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistralai/Mistral-7B-v0.3",
    "intfloat/e5-mistral-7b-instruct": "mistralai/Mistral-7B-v0.1",
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.2-1B-Instruct": "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B-Instruct": "meta-llama/Llama-3.2-3B",
    **{f"Qwen/Qwen3-{size}-Base": f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B")},
    **{f"Qwen/Qwen2.5-{size}-Instruct": f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B")},
    **{f"HuggingFaceTB/SmolLM2-{size}-Instruct": f"HuggingFaceTB/SmolLM2-{size}" for size in ("135M", "360M", "1.7B")},
}


def hub_shape(name: str) -> HubShape | None:
    """The sizes of a hub name (case does not matter), None where they are not listed."""
    lowered = {key.lower(): key for key in (*HUB_SHAPES, *_SAME)}
    key = lowered.get(name.lower())
    return HUB_SHAPES[_SAME.get(key, key)] if key is not None else None
