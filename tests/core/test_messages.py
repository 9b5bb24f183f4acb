"""Wording of messages: the nearest valid name, and the line that says what an error is."""

import pytest

from nvembed.core.messages import closest, first_line, nearest


@pytest.mark.parametrize(
    ("word", "match"), [("homogenous", "homogeneous"), ("BLENDED", "Blended"), ("zzz", None), ("", None), (None, None)]
)
def test_only_a_similar_name_is_named(word: object, match: str | None) -> None:
    choices = ["homogeneous", "Blended"]
    assert closest(word, choices) == match
    assert nearest(word, iter(choices)) == ("" if match is None else f" Did you mean '{match}'?")
    assert nearest(word, []) == ""


def test_the_first_line_with_text_is_the_message() -> None:
    assert first_line(RuntimeError("\n  \n  the cause\nmore")) == "the cause"
    assert first_line(TimeoutError()) == first_line(TimeoutError(" \n")) == "TimeoutError"


def test_an_error_from_ray_is_its_first_exception() -> None:
    """Its message is the traceback of the other process; the same text of ours is taken as it is."""
    text = "\x1b[36mray::work()\x1b[39m (pid=1)\n  File x\nnvembed.types.UserError: wrong\nRuntimeError: later"
    remote = type("RayTaskError", (Exception,), {"__module__": "ray.exceptions"})
    assert first_line(remote(text)) == "nvembed.types.UserError: wrong"
    assert first_line(remote("The actor died.\nmore")) == "The actor died."
    assert first_line(ValueError(text)).startswith("\x1b[36mray::work()")
