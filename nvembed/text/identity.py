"""Which texts can be embedded at all; when two texts count as the same, and how much of their words they share."""

from __future__ import annotations

from collections.abc import Set

import xxhash

MAX_TEXT_BYTES = 1_000_000  # more is a file that was taken for a text, not a text


def text_problem(text: object, max_bytes: int = MAX_TEXT_BYTES) -> str | None:
    """Why a text is not embedded; None where it is.

    Args:
        text: what stands where a text should.
        max_bytes: most bytes of its UTF-8 form.

    Returns:
        The end of a sentence that begins with the text's name: "is empty", "is int, not a text", ...
    """
    if not isinstance(text, str):
        return "is missing" if text is None else f"is {type(text).__name__}, not a text"
    if not text.strip():
        return "is empty"
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return "holds a lone surrogate, which no tokenizer takes"
    if size > max_bytes:
        return f"is longer than {max_bytes:,} bytes"
    return None


def text_hash(text: str) -> int:
    """Signed 64-bit hash of a text, case and white space aside: what counts as "the same text under another id"."""
    value = xxhash.xxh3_64_intdigest(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"))
    return value - (1 << 64) if value >= 1 << 63 else value


def word_triples(text: str) -> frozenset[int]:
    """What near duplicates are judged by: hashes of all runs of three words; single characters where words are not
    parted by spaces (a text of fewer than three words), so that Chinese and Japanese compare too."""
    words = text.casefold().split()
    if len(words) < 3:
        words = list("".join(words))
    runs = (" ".join(words[place : place + 3]) for place in range(max(len(words) - 2, 1)))
    return frozenset(xxhash.xxh3_64_intdigest(run.encode("utf-8", "surrogatepass")) for run in runs)


def jaccard(left: Set[int], right: Set[int]) -> float:
    """Shared share of two sets; 0 when both are empty."""
    union = len(left | right)
    return len(left & right) / union if union else 0.0
