"""The sentence-transformers part of a model folder: its module list, prompts, and custom code.

Mean pooling over everything and last-token pooling are stock modules and need no custom code. What stock modules
cannot do (latent attention; leaving the instruction out by character offsets) is done by copies of our own source
files, in which imports of each other are made relative.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nvembed.modeling.config import HEADS, EmbedderConfig, FoldedLatentAttentionConfig, LastTokenConfig, MeanConfig

CODE = {
    "sentence_modules.py": "nvembed.modeling",
    "bidirectional.py": "nvembed.modeling",
    "latent_attention.py": "nvembed.modeling",
    "pooling.py": "nvembed.modeling",
    "encoding.py": "nvembed.text",
}
POOLING_FOLDER = "1_Pooling"
LIBRARIES = ("sentence-transformers", "transformers", "torch")
# The first transformers whose mask builders read config.is_causal; older ones run the model causal.
REQUIREMENTS = {"sentence-transformers": ">=6.2", "transformers": ">=5.2"}


def needs_code(config: EmbedderConfig) -> bool:
    """Whether the pooling is beyond sentence-transformers' own modules."""
    if isinstance(config.pooling, MeanConfig):
        return config.text.mask_instruction
    return isinstance(config.pooling, HEADS)


def latent_attention_arguments(config: EmbedderConfig) -> dict[str, Any] | None:
    """Keyword arguments of `LatentAttention` or its folded form but the width; None for other poolings."""
    pooling = config.pooling
    return pooling.model_dump(exclude={"type"}) if isinstance(pooling, HEADS) else None


def write_modules(folder: Path, config: EmbedderConfig, dim: int) -> None:
    """Write `modules.json`, the modules' configurations, and the custom code where it is needed."""
    stock = "sentence_transformers.sentence_transformer.modules."
    first, second = "sentence_transformers.base.modules.transformer.Transformer", f"{stock}Pooling"
    pooling: dict[str, Any] = {"embedding_dimension": dim, "pooling_mode": "mean", "include_prompt": True}
    if isinstance(config.pooling, LastTokenConfig):
        pooling["pooling_mode"] = "lasttoken"
    if needs_code(config):
        first, second = "sentence_modules.MaskingTransformer", "sentence_modules.MaskedPooling"
        masking = {"bidirectional": config.bidirectional, **config.text.model_dump()}
        write_json(folder / "masking.json", masking)
        pooling = {"hidden_size": dim, "latent_attention": latent_attention_arguments(config)}
        if isinstance(config.pooling, FoldedLatentAttentionConfig):
            pooling["folded"] = True
        for name, source in code_files().items():
            (folder / name).write_text(source, "utf-8")
    write_json(
        folder / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": first},
            {"idx": 1, "name": "1", "path": POOLING_FOLDER, "type": second},
            {
                "idx": 2,
                "name": "2",
                "path": "2_Normalize",
                "type": "sentence_transformers.base.modules.normalize.Normalize",
            },
        ],
    )
    (folder / POOLING_FOLDER).mkdir(exist_ok=True)
    (folder / "2_Normalize").mkdir(exist_ok=True)
    write_json(folder / POOLING_FOLDER / "config.json", pooling)
    write_json(folder / "2_Normalize" / "config.json", {"module_input_name": "sentence_embedding"})
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": text},
            "module_output_name": "token_embeddings",
        },
    )


def code_files() -> dict[str, str]:
    """Name -> source of the custom code that a folder carries."""
    return {
        name: standalone(resources.files(package).joinpath(name).read_text("utf-8")) for name, package in CODE.items()
    }


def runs_only_our_code(folder: Path) -> bool:
    """Whether trusting a folder's code runs nothing but what this nvembed writes.

    All Python in it is ours to the byte, its modules are ours or sentence-transformers', and no configuration names
    code that lies elsewhere (`auto_map`).
    """
    ours = code_files()
    python = all(path.read_text("utf-8", "replace") == ours.get(path.name) for path in folder.rglob("*.py"))
    modules = json.loads((folder / "modules.json").read_text("utf-8"))
    known = (*(f"{name.removesuffix('.py')}." for name in ours), "sentence_transformers.")
    elsewhere = any('"auto_map"' in path.read_text("utf-8", "replace") for path in folder.rglob("*config*.json"))
    return python and all(str(module["type"]).startswith(known) for module in modules) and not elsewhere


def standalone(source: str) -> str:
    """A source file of ours with imports of our own modules made relative: all lie in one folder."""
    return re.sub(r"^from nvembed\.\w+\.(\w+) import", r"from .\1 import", source, flags=re.MULTILINE)


def write_prompts(folder: Path, prompts: Mapping[str, str]) -> None:
    """Write `config_sentence_transformers.json`; documents are bare unless a prompt says otherwise."""
    versions = library_versions()
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {
                "sentence_transformers": versions["sentence-transformers"],
                "transformers": versions["transformers"],
                "pytorch": versions["torch"],
            },
            "prompts": {"document": "", **prompts},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "requirements": REQUIREMENTS,
        },
    )


def library_versions() -> dict[str, str]:
    """Installed versions of what reads a model folder."""
    return {name: version(name) for name in LIBRARIES}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file of a model folder, keys in their own order."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
