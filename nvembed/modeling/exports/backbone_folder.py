"""The backbone form, for servers: a stock architecture, `is_causal: false`, tokenizer, no code.

    config.json, model.safetensors, tokenizer files    transformers' AutoModel
    modules.json, 1_Pooling/, sentence_bert_config.json, ...    stock pooling, in sentence-transformers' older spelling
    pooling.json, head/model.safetensors    the steps after the token states, where stock pooling is not enough

The older spelling (`sentence_transformers.models.*`, `pooling_mode_mean_tokens`) is what vLLM and TEI look for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from nvembed.core.runtime import no_progress_bars
from nvembed.modeling.bidirectional import attends_ahead
from nvembed.modeling.config import LastTokenConfig
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.exports.parity import ParityError
from nvembed.modeling.sentence_folder import needs_code, write_json, write_prompts

POOLING_FILE, HEAD_FILE = "pooling.json", "head/model.safetensors"


def write_backbone(embedder: Embedder, folder: Path, prompts: dict[str, str]) -> None:
    """Write the folder and load it again with plain transformers.

    Raises:
        ParityError: what was written has another direction or other token states.
    """
    with no_progress_bars():
        embedder.embedding_model.save_pretrained(folder)
    embedder.tokeniser.tokenizer.save_pretrained(folder)
    write_prompts(folder, prompts)
    write_json(folder / POOLING_FILE, describe_pooling(embedder))
    if needs_code(embedder.config):
        if embedder.latent_attention_model is not None:
            (folder / "head").mkdir()
            state = embedder.latent_attention_model.state_dict()
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / HEAD_FILE)
    else:
        _write_stock_pooling(embedder, folder)
    check_states(embedder, folder)


def describe_pooling(embedder: Embedder) -> dict[str, Any]:
    """The steps from token states to this model's vectors, in words and in numbers."""
    config = embedder.config
    stock = not needs_code(config)
    steps = {"mean": "mean over the pooled tokens", "last_token": "state of the last real token"}.get(
        config.pooling.type, "the head over the token states, then the mean over the pooled tokens"
    )
    masked = config.text.mask_instruction and not isinstance(config.pooling, LastTokenConfig)
    pooled = "not those of the instruction, nor BOS before it" if masked else "all of them"
    return {
        "stock": stock,
        "token_states_to_vector": f"{steps}; then length 1",
        "pooled_tokens": pooled,
        "pooling": config.pooling.model_dump(mode="json"),
        "head": HEAD_FILE if embedder.latent_attention_model is not None else None,
        "dim": embedder.dim,
        "bidirectional": config.bidirectional,
        "text": config.text.model_dump(mode="json"),
    }


def _write_stock_pooling(embedder: Embedder, folder: Path) -> None:
    last = isinstance(embedder.config.pooling, LastTokenConfig)
    names = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(names)
    ]
    write_json(folder / "modules.json", modules)
    for path in ("1_Pooling", "2_Normalize"):
        (folder / path).mkdir()
    pooling = {
        "word_embedding_dimension": embedder.dim,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": not last,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": last,
        "include_prompt": True,
    }
    write_json(folder / "1_Pooling" / "config.json", pooling)
    length = {"max_seq_length": embedder.config.text.max_length, "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", length)


@torch.no_grad()
def check_states(embedder: Embedder, folder: Path) -> float:
    """Load the folder with AutoModel and AutoTokenizer and compare token states; the largest difference.

    Raises:
        ParityError: beyond 1e-5, or attention of the other direction.
    """
    from transformers import AutoModel, AutoTokenizer

    texts = ["how do I sort a list", "x", "heap overflow in the parser of images"]
    with no_progress_bars():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    length = embedder.config.text.max_length
    exported = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    ours = embedder.tokeniser.collate(embedder.tokeniser.encode(texts, [""] * len(texts)))
    if not torch.equal(exported["input_ids"], ours["input_ids"]):
        raise ParityError("the exported tokenizer gives other ids than the model's")
    if attends_ahead(model.eval()) != embedder.config.bidirectional:
        raise ParityError("the exported backbone's attention has the other direction")
    inputs = {name: ours[name] for name in ("input_ids", "attention_mask")}
    states, again = (net(**inputs, use_cache=False).last_hidden_state for net in (embedder.embedding_model, model))
    mask_NL1 = ours["attention_mask"].unsqueeze(-1)
    worst = float(((states - again).abs() * mask_NL1).max())
    if not worst <= 1e-5 or np.isnan(worst):
        raise ParityError(f"token states of the exported backbone differ by {worst:.3g}, at most 1e-5 is allowed")
    return worst
