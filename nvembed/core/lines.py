"""Lines of foreign text files: any byte-order mark, and no line that fills the memory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import IO

from nvembed.types import UserError

MAX_LINE_BYTES = 64 << 20  # a row holds many texts of up to 1 MB; more is no row
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
_BLOCK = 1 << 20


def bounded_lines(
    file: IO[bytes], name: str, *, max_bytes: int | None = None, keep_ends: bool = False
) -> Iterator[tuple[int, bytes | None]]:
    """Number (from 1) and bytes of every line; only `\\n` ends a line.

    Args:
        file: opened for reading, uncompressed.
        name: of the file, for errors.
        max_bytes: longest line; by default `MAX_LINE_BYTES`.
        keep_ends: whether lines keep their `\\n` and `\\r\\n`.

    Returns:
        None instead of the bytes of a longer line, of which no more than `max_bytes` is ever in memory. A UTF-8
        byte-order mark is no part of the first line.

    Raises:
        UserError: the file is UTF-16 or UTF-32.
    """
    limit, number = max_bytes or MAX_LINE_BYTES, 0
    while line := file.readline(limit + 1):
        number += 1
        if number == 1:
            if line.startswith(_UTF16):
                raise UserError(f"{name} is UTF-16 or UTF-32. Convert it: iconv -f utf-16 -t utf-8 {name} > NEW")
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > limit and not line.endswith(b"\n"):
            while len(rest := file.readline(_BLOCK)) and not rest.endswith(b"\n"):
                pass
            yield number, None
        else:
            yield number, line if keep_ends else line.rstrip(b"\r\n")
