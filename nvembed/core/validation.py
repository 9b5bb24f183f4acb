"""Pydantic's errors in words for users: where, which value, what is allowed, the nearest name."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel

from nvembed.core.messages import nearest

Path = tuple[str | int, ...]
LARGEST = 2**53  # integers up to here are exact in JSON and as a float
LONGEST = 4096  # letters of a text in a configuration
_SHOWN = 60  # characters of a wrong value


def describe_error(
    error: Mapping[str, Any], section: Path, annotation: Any, get: Callable[[Path], Any]
) -> tuple[Path, str, bool]:
    """Where an error lies and what it is.

    Args:
        error: of a validation of the value at `section` against `annotation`.
        get: the value at a path, None where there is none.

    Returns:
        Path, message, and whether the key at the path is wrong, rather than its value.
    """
    path, fields, tagged = _locate(error["loc"], section, annotation, get)
    context: Mapping[str, Any] = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return path, unknown_key(str(path[-1]), fields), True
    if error["type"] == "missing":
        return path, "missing", False
    value = error["input"]
    if error["type"] == "union_tag_not_found":
        return (*path, "type"), f"missing; allowed: {', '.join(tagged)}", False
    if error["type"] == "union_tag_invalid":
        choices = list(tagged) or [str(context.get("expected_tags"))]
        tag = value.get("type") if isinstance(value, Mapping) else value
        return (*path, "type"), _wrong(tag, f"allowed: {', '.join(choices)}.", nearest(str(tag), choices)), False
    if error["type"] == "literal_error":
        choices = [part.strip("'") for part in str(context["expected"]).replace(" or ", ", ").split(", ")]
        return path, _wrong(value, f"allowed: {', '.join(choices)}.", nearest(str(value), choices)), False
    if error["type"] == "value_error":  # our own validators say it in full
        return path, str(context.get("error", error["msg"])), False
    message = error["msg"].replace("Input should be", "must be").replace("Value should", "must")
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        message = "must be a section (a mapping of keys)"
    return path, _wrong(value, message[0].lower() + message[1:], ""), False


def why_out_of_bounds(value: Any) -> str:
    """Why a plain value is refused whatever its key: not finite, too large, too long; "" where it is not."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}: must be a finite number"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"a number of {len(str(abs(value)))} digits: must be at most {LARGEST}"
    if isinstance(value, str) and len(value) > LONGEST:
        return f"a text of {len(value)} letters: must have at most {LONGEST}"
    return ""


def unknown_key(key: str, allowed: Sequence[str]) -> str:
    """The message on a key that a section does not have."""
    return f"unknown key.{nearest(key, allowed)} Allowed here: {', '.join(sorted(allowed))}."


def _wrong(value: Any, message: str, hint: str) -> str:
    shown = repr(value)
    if len(shown) > _SHOWN:
        shown = shown[:_SHOWN] + "..."
    return f"{shown}: {message}{hint}"


def _locate(
    location: Sequence[str | int], section: Path, annotation: Any, get: Callable[[Path], Any]
) -> tuple[Path, list[str], list[str]]:
    """The path of a pydantic location (which holds union tags too), the keys allowed around its last part, and the tags
    allowed at it."""
    path, current = section, annotation
    around: list[str] = []
    for part in location:
        chosen = tagged_models(current)
        value = get(path)
        if chosen and isinstance(value, Mapping) and part == value.get("type") and part not in value:
            current = chosen[str(part)]
            continue
        model = next((choice for choice in alternatives(current) if is_model(choice)), None)
        if part == "[key]":
            continue
        path = (*path, part)
        around = list(model.model_fields) if model else []
        if model and part in model.model_fields:
            current = model.model_fields[str(part)].annotation
            info = model.model_fields[str(part)]
            current = Annotated[(current, info)] if info.discriminator else current
        else:
            current = _item(current)
    return path, around, list(tagged_models(current))


def is_model(choice: Any) -> bool:
    """Whether an alternative of an annotation is a pydantic model."""
    return isinstance(choice, type) and issubclass(choice, BaseModel)


def alternatives(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, with Annotated, Optional and unions opened."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for choice in typing.get_args(annotation) for inner in alternatives(choice)]
    return [annotation]


def _item(annotation: Any) -> Any:
    """The type of the items of a tuple, list or dict annotation; Any when there is none."""
    for choice in alternatives(annotation):
        arguments = typing.get_args(choice)
        if arguments:
            return arguments[-1] if typing.get_origin(choice) is dict else arguments[0]
    return Any


def tagged_models(annotation: Any) -> dict[str, Any]:
    """Models of a union by the literal of their `type` field."""
    models = {}
    for choice in alternatives(annotation):
        if is_model(choice) and "type" in choice.model_fields:
            for literal in alternatives(choice.model_fields["type"].annotation):
                if typing.get_origin(literal) is Literal:
                    models.update(dict.fromkeys(typing.get_args(literal), choice))
    return models
