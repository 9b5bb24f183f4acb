"""Text to token ids with the instruction left out of pooling by character offsets.

Standard library only, and on purpose: this file is copied into model folders, where sentence-transformers runs it in
environments without nvembed. `Tokeniser` is the same thing with checks and configuration.

Counting the instruction's tokens would be wrong: GPT-2-style BPE joins the space at the end of "Query: " with the next
word, so the instruction alone has one token more than it takes up in front of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Tokens(NamedTuple):
    """One text as model input, unpadded.

    Attributes:
        input_ids: ids with BOS/EOS.
        pool_mask: 1 where the token is pooled; at least one is.
        cut: whether the text had more tokens than there was room for.
    """

    input_ids: list[int]
    pool_mask: list[int]
    cut: bool = False


class Specials(NamedTuple):
    """Ids put once around the truncated text; None where the model has none."""

    bos: int | None
    eos: int | None

    @property
    def taken(self) -> int:
        """How many tokens of `max_length` they take."""
        return (self.bos is not None) + (self.eos is not None)


def prepare_backend(backend: Any) -> None:
    """Bring a `tokenizers.Tokenizer` into the state this module needs; stock calls change it (padding, truncation).

    Special tokens written out in a text ("</s>") are text: BOS and EOS come from here alone.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True


def count_tokens(backend: Any, texts: Sequence[str], max_length: int, specials: Specials) -> list[int]:
    """Length of each text's `Tokens.input_ids`."""
    prepare_backend(backend)
    room = max_length - specials.taken
    encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [min(len(encoding), room) + specials.taken for encoding in encoded]


def encode_with_mask(
    backend: Any,
    texts: Sequence[str],
    instructions: Sequence[str],
    max_length: int,
    specials: Specials,
    mask_instruction: bool,
) -> list[Tokens]:
    """Encode `instruction + text`, cut it to `max_length` with BOS/EOS intact, and mark what is pooled.

    A token belongs to the instruction when it ends inside it. With an instruction BOS is not pooled either (NV-Embed
    drops both). What is left is pooled; if that is nothing, the last token.
    """
    prepare_backend(backend)
    joined = [instruction + text for instruction, text in zip(instructions, texts, strict=True)]
    masked = [mask_instruction and bool(instruction) for instruction in instructions]
    encode = backend.encode_batch if any(masked) else backend.encode_batch_fast  # the fast one has no offsets
    room = max_length - specials.taken
    rows = []
    for encoding, instruction, mask in zip(encode(joined, add_special_tokens=False), instructions, masked, strict=True):
        ids = encoding.ids[:room]
        if mask:
            end = len(instruction)
            pooled = [int(stop > end) for _, stop in encoding.offsets[:room]]
        else:
            pooled = [1] * len(ids)
        rows.append(_with_specials(ids, pooled, specials, mask)._replace(cut=len(encoding.ids) > room))
    return rows


def _with_specials(ids: list[int], pooled: list[int], specials: Specials, mask: bool) -> Tokens:
    if specials.bos is not None:
        ids, pooled = [specials.bos, *ids], [0 if mask else 1, *pooled]
    if specials.eos is not None:
        ids, pooled = [*ids, specials.eos], [*pooled, 1]
    if not any(pooled):
        pooled = [*pooled[:-1], 1]
    return Tokens(ids, pooled)


def pad_batch(batch: Sequence[Tokens], pad_id: int) -> dict[str, list[list[int]]]:
    """Right-padded rows of `input_ids`, `attention_mask`, `pool_mask`."""
    width = max(len(tokens.input_ids) for tokens in batch)
    fill = [width - len(tokens.input_ids) for tokens in batch]
    return {
        "input_ids": [tokens.input_ids + [pad_id] * gap for tokens, gap in zip(batch, fill, strict=True)],
        "attention_mask": [[1] * (width - gap) + [0] * gap for gap in fill],
        "pool_mask": [tokens.pool_mask + [0] * gap for tokens, gap in zip(batch, fill, strict=True)],
    }
