"""Text to model input: BOS/EOS once as ids, the instruction left out of pooling by character offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nvembed.storage import UserError
from nvembed.text.config import TextConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Tokens:
    """Ids of one text (instruction, text, BOS/EOS) and which of them are pooled (1) or not (0)."""

    input_ids: list[int]
    pool_mask: list[int]


class Tokeniser:
    """A fast tokenizer and a TextConfig.

    Raises:
        UserError: the tokenizer has no offsets (a slow one), or lacks a special token that the config asks for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: TextConfig) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError("the tokenizer gives no character offsets (a slow one); convert it to a fast tokenizer")
        for wanted, name in ((config.add_bos, "bos_token"), (config.add_eos, "eos_token")):
            if wanted and getattr(tokenizer, f"{name}_id") is None:
                raise UserError(f"the tokenizer has no {name}: set text.add_{name[:3]} to false or give it one")
        self.tokenizer = tokenizer
        self.config = config
        self._before = [tokenizer.bos_token_id] if config.add_bos else []
        self._after = [tokenizer.eos_token_id] if config.add_eos else []
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._pad = 0 if pad is None else pad

    def encode(self, texts: Sequence[str], instructions: Sequence[str]) -> list[Tokens]:
        """Tokens of `instruction + text`, truncated to max_length with BOS and EOS kept.

        A token belongs to the instruction iff it ends inside it: byte-level BPE joins the instruction's last space
        with the next word, and that token is pooled. Where an instruction is masked, BOS is too (SPEC 1). When
        nothing but the instruction is left, what follows it (EOS) is pooled, or everything if nothing does.
        """
        room = self.config.max_length - len(self._before) - len(self._after)
        joined = [instruction + text for instruction, text in zip(instructions, texts, strict=True)]
        if not joined:
            return []
        encoded = self.tokenizer(
            joined, add_special_tokens=False, truncation=True, max_length=room, return_offsets_mapping=True,
            return_attention_mask=False,
        )  # fmt: skip
        rows = zip(encoded["input_ids"], encoded["offset_mapping"], instructions, strict=True)
        return [self._tokens(ids, offsets, instruction) for ids, offsets, instruction in rows]

    def _tokens(self, ids: list[int], offsets: list[tuple[int, int]], instruction: str) -> Tokens:
        masked = len(instruction) if self.config.mask_instruction else 0
        inside = [0 if masked and end <= masked else 1 for _, end in offsets]
        before = [0 if masked else 1] * len(self._before)
        mask = before + inside + [1] * len(self._after)
        return Tokens(self._before + list(ids) + self._after, mask if any(mask) else [1] * len(mask))

    def lengths(self, texts: Sequence[str], instructions: Sequence[str]) -> np.ndarray:
        """int32 [N]: tokens of each input as `encode` gives them."""
        return np.array([len(tokens.input_ids) for tokens in self.encode(texts, instructions)], dtype=np.int32)

    def collate(self, tokens: Sequence[Tokens], device: Any = None) -> dict[str, Any]:
        """Right-padded long tensors `input_ids`, `attention_mask`, `pool_mask`, each [N, longest]."""
        import torch

        width = max((len(row.input_ids) for row in tokens), default=0)
        shape = (len(tokens), width)
        arrays = {
            "input_ids": np.full(shape, self._pad, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "pool_mask": np.zeros(shape, dtype=np.int64),
        }
        for index, row in enumerate(tokens):
            arrays["input_ids"][index, : len(row.input_ids)] = row.input_ids
            arrays["attention_mask"][index, : len(row.input_ids)] = 1
            arrays["pool_mask"][index, : len(row.pool_mask)] = row.pool_mask
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
