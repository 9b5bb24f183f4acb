"""The tokeniser: a fast Hugging Face tokenizer and how a text becomes model input.

BOS and EOS are ids, put once around the truncated text; the instruction is left out of pooling by character offsets
(`encoding.py`). The tokenizer's own post-processor is set to the same BOS/EOS, so that a stock
`tokenizer(text, truncation=True, max_length=...)` gives exactly these ids, wherever the tokenizer is saved to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nvembed.text.config import TextConfig
from nvembed.text.encoding import Specials, Tokens, count_tokens, encode_with_mask, pad_batch
from nvembed.types import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

__all__ = ["Tokeniser", "Tokens"]


class Tokeniser:
    """Texts to token ids and pooling masks.

    Args:
        tokenizer: a fast tokenizer; it is copied.
        config: lengths and special tokens.

    Attributes:
        tokenizer: the copy, generic: right padding and truncation, `max_length`, a post-processor that adds BOS/EOS,
            no chat template (sentence-transformers would render every text as a chat).

    Raises:
        UserError: a slow tokenizer, or one without a special token that `config` asks for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: TextConfig) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{type(tokenizer).__name__} is not a fast tokenizer: it has no character offsets, which leaving the "
                "instruction out of pooling needs. Convert the model to one with a tokenizer.json."
            )
        if not (config.add_bos or config.add_eos):
            raise UserError("text: neither add_bos nor add_eos is set, so an empty text would have no token; set one.")
        self.config = config
        self.specials = Specials(
            _special_id(tokenizer, "bos", "add_bos") if config.add_bos else None,
            _special_id(tokenizer, "eos", "add_eos") if config.add_eos else None,
        )
        self.tokenizer = _generic(tokenizer, config)
        self.tokenizer.backend_tokenizer.post_processor = _post_processor(self.tokenizer, self.specials)
        pad_id = self.tokenizer.pad_token_id
        assert pad_id is not None, "BOS or EOS is there, checked above"
        self.pad_id = int(pad_id)

    def encode(self, texts: Sequence[str], prompts: Sequence[str], max_length: int | None = None) -> list[Tokens]:
        """Token ids and pooling mask of each `prompt + text`, not padded.

        Each is at most `max_length` long, or the config's where that is None.
        """
        return encode_with_mask(
            self.tokenizer.backend_tokenizer,
            texts,
            prompts,
            max_length or self.config.max_length,
            self.specials,
            self.config.mask_instruction,
        )

    def lengths(self, texts: Sequence[str], prompts: Sequence[str], *, cut: bool = True) -> np.ndarray:
        """int32 [N]: tokens of each input, BOS/EOS included, as `encode` would cut it (or whole)."""
        joined = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        longest = self.config.max_length if cut else int(np.iinfo(np.int32).max)
        counted = count_tokens(self.tokenizer.backend_tokenizer, joined, longest, self.specials)
        return np.array(counted, dtype=np.int32)

    def collate(self, batch: Sequence[Tokens], device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """Right-padded long tensors [N, L]: `input_ids`, `attention_mask`, `pool_mask`."""
        import torch

        rows = pad_batch(batch, self.pad_id)
        return {name: torch.tensor(values, dtype=torch.long, device=device) for name, values in rows.items()}


def _special_id(tokenizer: PreTrainedTokenizerFast, kind: str, key: str) -> int:
    number = getattr(tokenizer, f"{kind}_token_id")
    if number is None:
        raise UserError(
            f"text.{key} is true, but the tokenizer has no {kind.upper()} token. Set text.{key}: false, or name one "
            f"({kind}_token) in its tokenizer_config.json."
        )
    return int(number)


def _generic(tokenizer: PreTrainedTokenizerFast, config: TextConfig) -> PreTrainedTokenizerFast:
    """A plain fast tokenizer over a copy of the backend.

    Classes of their own (LlamaTokenizer, Qwen2Tokenizer) rebuild normaliser, pre-tokeniser or post-processor at load
    and so may undo what is set here; the generic class takes `tokenizer.json` as it is.
    """
    from transformers import PreTrainedTokenizerFast

    names = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")}
    if names["pad_token"] is None:  # NV-Embed pads with EOS too; padding is masked, so any id would do
        names["pad_token"] = names["eos_token"] or names["bos_token"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_max_length=config.max_length,
        padding_side="right",
        truncation_side="right",
        split_special_tokens=True,  # special tokens written out in a text are text
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token is not None},
    )


def _post_processor(tokenizer: PreTrainedTokenizerFast, specials: Specials) -> Any:
    """`[BOS] text [EOS]`; after a byte-level processor where the tokenizer had one, which only trims offsets."""
    from tokenizers import processors

    names = {number: tokenizer.convert_ids_to_tokens(number) for number in specials if number is not None}
    before = [f"{names[specials.bos]}:0"] if specials.bos is not None else []
    after = [f"{names[specials.eos]}:0"] if specials.eos is not None else []
    # The list form: token texts may hold spaces or colons, which the string form would split at.
    template = processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[*before, "$A:0", *after, *[piece[:-1] + "1" for piece in before], "$B:1", *[p[:-1] + "1" for p in after]],
        special_tokens=[(name, number) for number, name in names.items()],
    )
    if "ByteLevel" in str(tokenizer.backend_tokenizer.pre_tokenizer):
        return processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return template
