"""HTML as nested calls: every string is escaped unless it is `Markup` already, so nothing unescaped can slip in."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

VOID = frozenset({"meta", "br", "hr", "line", "circle", "rect", "polyline", "polygon", "path"})


class Markup(str):
    """A string that is HTML already."""

    __slots__ = ()


Content = str | int | Markup | None


def tag(name: str, /, *children: Content, **attributes: str | int | float) -> Markup:
    """`<name attribute="...">children</name>`; `class_` and `stroke_width` become `class` and `stroke-width`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    if name in VOID and not children:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(parts: Iterable[Content], separator: str = "") -> Markup:
    """Parts one after the other; plain strings are escaped, None is left out."""
    return Markup(separator.join(escape(part) for part in parts if part is not None))


def escape(part: Content) -> Markup:
    """Markup as it is, anything else escaped."""
    return part if isinstance(part, Markup) else Markup(html.escape(str(part)))


def table(caption: str, head: Sequence[Content], rows: Iterable[Sequence[Content]], *, numeric: bool = True) -> Markup:
    """A table in a box that scrolls sideways on a narrow screen; the first cell of a row is its header.

    Args:
        numeric: whether the other cells are numbers (kept on one line) or text (wrapped).
    """
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", "–" if cell is None else cell) for cell in row[1:]))
        for row in rows
    ]
    inner = tag(
        "table",
        tag("caption", tag("div", caption)),
        tag("thead", top),
        tag("tbody", *body),
        class_="numbers" if numeric else "texts",
    )
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)
