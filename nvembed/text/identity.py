"""Identity of texts: hashes, words, Jaccard similarity; and which texts can be embedded.

Every value is the same on every machine and Python: artifacts hold these hashes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

import numpy as np
import xxhash

from nvembed.types import UserError

MAX_TEXT_BYTES = 1_000_000  # more is a file that was taken for a text, not a text

Shingles = TypeVar("Shingles", AbstractSet[Any], np.ndarray)

_LISTED = 5
_WORD = re.compile(r"\w+|[^\w\s]")


def is_blank(text: object) -> bool:
    """Whether something is a text without a letter."""
    return isinstance(text, str) and not text.strip()


def text_problem(text: object, max_bytes: int = MAX_TEXT_BYTES) -> str | None:
    """Why a text is not embedded; None where it is.

    Args:
        text: any value in the place of a text.
        max_bytes: most bytes of its UTF-8 form.

    Returns:
        The end of a sentence that begins with the text's name: "is empty", "is int, not a text", ...
    """
    if not isinstance(text, str):
        return "is missing" if text is None else f"is {type(text).__name__}, not a text"
    if is_blank(text):
        return "is empty"
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return "holds a lone surrogate, which no tokenizer takes"
    if size > max_bytes:
        return f"is longer than {max_bytes:,} bytes"
    return None


def refuse_texts(where: str, problems: Mapping[str, str], advice: str = "") -> None:
    """Refuse texts that cannot be embedded; nothing happens without any.

    Args:
        where: the function, for the message.
        problems: a text's name -> its `text_problem`.
        advice: what to do besides correcting or removing them.

    Raises:
        UserError: with the first five.
    """
    if problems:
        listed = "; ".join(f"{name} {problem}" for name, problem in list(problems.items())[:_LISTED])
        count = "1 text" if len(problems) == 1 else f"{len(problems)} texts"
        raise UserError(f"{where}: {count} cannot be embedded: {listed}. Correct or remove them.{advice}")


def check_texts(where: str, texts: list[Any], *, allow_empty: bool = False) -> list[str]:
    """A list of texts that can all be embedded.

    Args:
        allow_empty: whether texts may be empty: a model gives them a vector too.

    Raises:
        UserError: with the places of those that cannot.
    """
    checked = {index: text for index, text in enumerate(texts) if not (allow_empty and is_blank(text))}
    problems = {index: problem for index, text in checked.items() if (problem := text_problem(text)) is not None}
    refuse_texts(where, {f"texts[{index}]": problem for index, problem in problems.items()})
    return texts


# -- hashes -----------------------------------------------------------------------------------------------------------


def stable_hash(*parts: object) -> int:
    """Unsigned 64-bit xxh3 of the parts joined by NUL."""
    return xxhash.xxh3_64_intdigest("\0".join(str(part) for part in parts).encode("utf-8", "surrogatepass"))


def unit_hash(*parts: object) -> float:
    """`stable_hash` as a number in [0, 1)."""
    return (stable_hash(*parts) >> 11) / 2**53


def signed_hash(*parts: object) -> int:
    """`stable_hash` as a signed 64-bit number, for int64 arrays."""
    value = stable_hash(*parts)
    return value - 2**64 if value >= 2**63 else value


def document_key(dataset: str, document_id: str) -> int:
    """`Batch.document_ids` of a document: `signed_hash(dataset, id)`; 0 is kept for "no document"."""
    return signed_hash(dataset, document_id) or 1


def document_digest(title: str, text: str) -> bytes:
    """128-bit xxh3, equal where both title and text are."""
    return xxhash.xxh3_128_digest(f"{len(title)}\0{title}{text}".encode())


def folded_hash(text: str) -> int:
    """Unsigned 64-bit xxh3 of a text without regard to case and white space."""
    return xxhash.xxh3_64_intdigest(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"))


def text_key(text: str, instruction: str) -> str:
    """Key of an embedded text: 128-bit xxh3 of prompt and text, hex."""
    return xxhash.xxh3_128_hexdigest(f"{instruction}\0{text}".encode("utf-8", "surrogatepass"))


def text_digest(text: str, instruction: str) -> int:
    """The first 64 bits of `text_key`, signed."""
    return int.from_bytes(bytes.fromhex(text_key(text, instruction)[:16]), "big", signed=True)


_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def mix(keys: np.ndarray) -> np.ndarray:
    """Every uint64 to another, well mixed: a step of SplitMix64."""
    with np.errstate(over="ignore"):
        keys = keys + _INCREMENT
        for shift, factor in _ROUNDS:
            keys = (keys ^ (keys >> shift)) * factor
    return keys ^ (keys >> np.uint64(31))


def mix_seeded(keys: np.ndarray, seed: int) -> np.ndarray:
    """Integers and a seed to uint64, well mixed; the order of every training stream.

    Not `mix` of both: here SplitMix64's increment is added after each multiplication. Neither can change.
    """
    with np.errstate(over="ignore"):
        mixed = keys.astype(np.int64).view(np.uint64) ^ (np.uint64(seed & (2**64 - 1)) * _INCREMENT)
        for shift, factor in _ROUNDS:
            mixed = (mixed ^ (mixed >> shift)) * factor + _INCREMENT
    return mixed ^ (mixed >> np.uint64(31))


# -- near duplicates --------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Case-folded words; a symbol counts as a word, white space as nothing."""
    return _WORD.findall(text.casefold())


def text_hash(text: str) -> int:
    """`folded_hash` as a signed number, for int64 columns: what counts as the same text under another id."""
    value = folded_hash(text)
    return value - (1 << 64) if value >= 1 << 63 else value


def word_triples(text: str) -> frozenset[int]:
    """Hashes of all runs of three words, whose Jaccard similarity decides near duplicates.

    A text of fewer than three words is taken as single characters: Chinese and Japanese do not separate words by
    spaces.
    """
    words = text.casefold().split()
    if len(words) < 3:
        words = list("".join(words))
    runs = (" ".join(words[place : place + 3]) for place in range(max(len(words) - 2, 1)))
    return frozenset(xxhash.xxh3_64_intdigest(run.encode("utf-8", "surrogatepass")) for run in runs)


def jaccard(left: Shingles, right: Shingles) -> float:
    """Jaccard similarity of two sets of shingles: shared ones over all; 0 when both are empty.

    Args:
        left, right: two sets, or two sorted arrays without repeats, which need far less memory.
    """
    if isinstance(left, np.ndarray):
        shared = len(np.intersect1d(left, right, assume_unique=True))
    else:
        shared = len(left & right)
    return shared / (len(left) + len(right) - shared) if shared else 0.0
