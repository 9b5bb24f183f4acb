"""Words that messages share: the nearest valid name, the first line of an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_CAUSE = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt)(?:: .*)?$", re.MULTILINE)


def closest(word: object, choices: Iterable[str]) -> str | None:
    """The choice most similar to a word, case ignored; None when none is similar."""
    lowered = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(str(word).lower(), lowered, n=1, cutoff=0.6)
    return lowered[matches[0]] if matches else None


def nearest(word: object, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the most similar choice; empty when none is similar."""
    match = closest(word, choices)
    return "" if match is None else f" Did you mean '{match}'?"


def first_line(error: BaseException) -> str:
    """First line of an error's message; of one from Ray, whose message is the remote traceback, the first exception.

    The name of the error's class where its message has no text.
    """
    text = str(error)
    cause = _CAUSE.search(text) if type(error).__module__.partition(".")[0] == "ray" else None
    if cause is not None:
        return cause.group()
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
