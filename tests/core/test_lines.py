"""Lines of foreign files: whole, bounded, without a byte-order mark."""

import io
import tracemalloc

import pytest

from nvembed.core.lines import bounded_lines
from nvembed.types import UserError


def test_lines_and_their_numbers() -> None:
    data = b"\xef\xbb\xbfa\r\n\nb\x0bc\nlast"
    assert list(bounded_lines(io.BytesIO(data), "x")) == [(1, b"a"), (2, b""), (3, b"b\x0bc"), (4, b"last")]
    kept = [line for _, line in bounded_lines(io.BytesIO(data), "x", keep_ends=True)]
    assert kept == [b"a\r\n", b"\n", b"b\x0bc\n", b"last"]


@pytest.mark.parametrize("last", [b"\nafter\n", b""])
def test_a_longer_line_is_passed_over(last: bytes) -> None:
    lines = list(bounded_lines(io.BytesIO(b"ok\n" + b"x" * 5000 + last), "x", max_bytes=10))
    assert lines == [(1, b"ok"), (2, None), *([(3, b"after")] if last else [])]
    assert list(bounded_lines(io.BytesIO(b"0123456789\n"), "x", max_bytes=10)) == [(1, b"0123456789")]


def test_a_bomb_takes_no_memory() -> None:
    class Endless(io.RawIOBase):
        left = 300 << 20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            count = min(len(buffer), self.left)
            self.left -= count
            buffer[:count] = b"x" * count
            return count

    tracemalloc.start()
    lines = list(bounded_lines(io.BufferedReader(Endless(), 1 << 16), "x", max_bytes=1 << 20))
    assert lines == [(1, None)] and tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_other_encodings_are_named() -> None:
    for encoding in ("utf-16", "utf-16-be", "utf-32"):
        data = ("\ufeff" if encoding.endswith("be") else "") + "text"
        with pytest.raises(UserError, match=r"x is UTF-16 or UTF-32\. Convert it: iconv"):
            list(bounded_lines(io.BytesIO(data.encode(encoding)), "x"))
