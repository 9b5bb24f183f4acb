"""What sentence-transformers runs for a folder whose pooling it does not have; copied into such model folders.

Its own way to leave a prompt out of pooling counts the prompt's tokens, which byte-level BPE makes one too many, and
it has no latent attention. Loading needs `trust_remote_code=True`, given by the user.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers.base.modules.module import Module
from sentence_transformers.base.modules.transformer import Transformer

from nvembed.modeling.bidirectional import attends_ahead
from nvembed.modeling.latent_attention import FoldedLatentAttention, LatentAttention
from nvembed.modeling.pooling import mean_pool
from nvembed.text.encoding import Specials, encode_with_mask, pad_batch

TEXT_FILE = "masking.json"
WEIGHTS_FILE = "model.safetensors"


class MaskingTransformer(Transformer):
    """The stock transformer with a pooling mask made by character offsets."""

    masking: dict[str, Any]  # contents of masking.json: `bidirectional`, and the fields of nvembed's TextConfig

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> MaskingTransformer:
        """Load the stock module, then the text handling from `masking.json`.

        Raises:
            ValueError: the installed transformers runs this bidirectional model causal.
        """
        module = super().load(model_name_or_path, *args, **kwargs)
        hub = {key: kwargs.get(key) for key in ("subfolder", "token", "cache_folder", "revision")}
        path = cls.load_file_path(
            model_name_or_path,
            TEXT_FILE,
            local_files_only=kwargs.get("local_files_only", False),
            **{key: value for key, value in hub.items() if value is not None},
        )
        if path is None:
            raise ValueError(f"{model_name_or_path} has no {TEXT_FILE}: it is not a complete nvembed model folder.")
        module.masking = json.loads(Path(path).read_text(encoding="utf-8"))
        if module.masking["bidirectional"] and not attends_ahead(module.model):
            raise ValueError(
                f"{model_name_or_path}: the model is bidirectional, but the installed transformers runs it causal. "
                "Install transformers >= 5.2."
            )
        return module

    def preprocess(
        self, inputs: Any, prompt: str | None = None, processing_kwargs: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Token ids, attention mask and pooling mask of `prompt + text`."""
        texts = list(inputs)
        if not texts:
            return {}
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("this model embeds strings only")
        text = self.masking
        tokenizer = self.tokenizer
        assert tokenizer is not None
        specials = Specials(
            tokenizer.bos_token_id if text["add_bos"] else None, tokenizer.eos_token_id if text["add_eos"] else None
        )
        tokens = encode_with_mask(
            tokenizer.backend_tokenizer,
            texts,
            [prompt or ""] * len(texts),
            int(self.max_seq_length or text["max_length"]),
            specials,
            bool(text["mask_instruction"]),
        )
        return {
            name: torch.tensor(rows, dtype=torch.long)
            for name, rows in pad_batch(tokens, tokenizer.pad_token_id).items()
        }

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `token_embeddings`; the pooling mask is not the backbone's business."""
        inputs = {name: features[name] for name in ("input_ids", "attention_mask")}
        features["token_embeddings"] = super().forward(inputs, **kwargs)["token_embeddings"]
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save like the stock module, and `masking.json` beside it."""
        super().save(output_path, *args, **kwargs)
        Path(output_path, TEXT_FILE).write_text(json.dumps(self.masking, indent=2), encoding="utf-8")


class MaskedPooling(Module):
    """Latent attention where the folder has it, then the float32 mean over the pooling mask."""

    config_keys: list[str] = ["hidden_size", "latent_attention", "folded"]  # noqa: RUF012 (as its base class declares it)

    def __init__(self, hidden_size: int, latent_attention: dict[str, Any] | None, folded: bool = False) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.latent_attention = latent_attention
        self.folded = folded
        head = FoldedLatentAttention if folded else LatentAttention
        self.latent_attention_model = head(hidden_size, **latent_attention) if latent_attention else None

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` [N, D], not yet of length 1."""
        states_NLD = features["token_embeddings"]
        if self.latent_attention_model is not None:
            states_NLD = self.latent_attention_model(states_NLD)
        features["sentence_embedding"] = mean_pool(states_NLD, features["pool_mask"])
        return features

    def get_embedding_dimension(self) -> int:
        """Width of the vectors."""
        return self.hidden_size

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Configuration and weights (safetensors)."""
        self.save_config(output_path)
        if self.latent_attention_model is not None:
            save_file(self.latent_attention_model.state_dict(), Path(output_path, WEIGHTS_FILE))

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", *args: Any, **kwargs: Any) -> MaskedPooling:
        """Load configuration and weights."""
        assert not args, "sentence-transformers passes keywords"
        hub = {key: kwargs[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in kwargs}
        module = cls(**cls.load_config(model_name_or_path, subfolder=subfolder, **hub))
        if module.latent_attention_model is not None:
            path = cls.load_file_path(model_name_or_path, WEIGHTS_FILE, subfolder=subfolder, **hub)
            if path is None:
                raise ValueError(f"{model_name_or_path} has no {subfolder}/{WEIGHTS_FILE}: the folder is incomplete.")
            module.latent_attention_model.load_state_dict(load_file(path))
        return module
