"""Which texts can be embedded at all; standard library only."""

from __future__ import annotations

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
