"""Pydantic's errors as problems for users: path, line, value, what is allowed, nearest match."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from nvembed.core.messages import nearest
from nvembed.recipe.document import Document, Path, Problem

_SHOWN = 60  # characters of a wrong value


def validate(model: type[BaseModel], document: Document) -> tuple[dict[Path, Any], list[Problem]]:
    """Check every value by itself, so that one mistake hides no other, then the validators of each section.

    Args:
        model: the root model.
        document: the recipe's values and positions.

    Returns:
        The valid values and sections by path (`("stage_1", "train")`), and the problems.
    """
    sections: dict[Path, Any] = {}
    return sections, _section(model, (), document, sections)


def _section(model: type[BaseModel], path: Path, document: Document, sections: dict[Path, Any]) -> list[Problem]:
    section, allowed = document.get(path), list(model.model_fields)
    problems = [_unknown(document, (*path, key), allowed) for key in section if key not in allowed]
    for name, info in model.model_fields.items():
        here = (*path, name)
        if name in section:
            problems += _field(info, here, document, sections)
        elif info.is_required():
            problems.append(Problem(document.position(path, key=True), here, "missing"))
        else:
            sections[here] = info.get_default(call_default_factory=True)
    return problems


def _field(info: FieldInfo, path: Path, document: Document, sections: dict[Path, Any]) -> list[Problem]:
    value = document.get(path)
    inner = _model_of(info.annotation, value)
    if inner is not None and (problems := _section(inner, path, document, sections)):
        return problems
    annotated: Any = Annotated[(info.annotation, info)]  # with the field's constraints
    try:
        sections[path] = TypeAdapter(annotated).validate_python(value)
    except ValidationError as error:
        return [_problem(detail, path, annotated, document) for detail in error.errors()]
    return []


def _model_of(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The model of a mapping: the annotation's only one, or the one that its `type` names."""
    if not isinstance(value, Mapping):
        return None
    tagged = _tagged(annotation)
    if tagged:
        return tagged.get(value.get("type"))  # type: ignore[arg-type]
    models = [choice for choice in _choices(annotation) if _is_model(choice)]
    return models[0] if len(models) == 1 else None


def _problem(error: Mapping[str, Any], section: Path, annotation: Any, document: Document) -> Problem:
    path, fields, tagged = _locate(error["loc"], section, annotation, document)
    context: Mapping[str, Any] = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return _unknown(document, path, fields)
    position = document.position(path)
    if error["type"] == "missing":
        return Problem(position, path, "missing")
    value = error["input"]
    if error["type"] == "union_tag_not_found":
        return Problem(position, (*path, "type"), f"missing; allowed: {', '.join(tagged)}")
    if error["type"] == "union_tag_invalid":
        choices = tagged or [str(context.get("expected_tags"))]
        tag = value.get("type") if isinstance(value, Mapping) else value
        position = document.position((*path, "type"))
        return Problem(position, (*path, "type"), _wrong(tag, f"allowed: {', '.join(choices)}.", nearest(tag, choices)))
    if error["type"] == "literal_error":
        choices = [part.strip("'") for part in str(context["expected"]).replace(" or ", ", ").split(", ")]
        return Problem(position, path, _wrong(value, f"allowed: {', '.join(choices)}.", nearest(value, choices)))
    if error["type"] == "value_error":  # our own validators say it in full
        return Problem(position, path, str(context.get("error", error["msg"])))
    message = error["msg"].replace("Input should be", "must be").replace("Value should", "must")
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        message = "must be a section (a mapping of keys)"
    return Problem(position, path, _wrong(value, message[0].lower() + message[1:], ""))


def _wrong(value: Any, message: str, hint: str) -> str:
    shown = repr(value)
    if len(shown) > _SHOWN:
        shown = shown[:_SHOWN] + "..."
    return f"{shown}: {message}{hint}"


def _unknown(document: Document, path: Path, allowed: Sequence[str]) -> Problem:
    key = str(path[-1])
    message = f"unknown key.{nearest(key, allowed)} Allowed here: {', '.join(sorted(allowed))}."
    return Problem(document.position(path, key=True), path, message)


def _locate(
    location: Sequence[str | int], section: Path, annotation: Any, document: Document
) -> tuple[Path, list[str], list[str]]:
    """The path in the recipe of a pydantic location (which holds union tags too), the keys allowed around its last
    part, and the tags allowed at it."""
    path, current = section, annotation
    around: list[str] = []
    for part in location:
        chosen = _tagged(current)
        value = document.get(path)
        if chosen and isinstance(value, Mapping) and part == value.get("type") and part not in value:
            current = chosen[str(part)]
            continue
        model = next((choice for choice in _choices(current) if _is_model(choice)), None)
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
    return path, around, list(_tagged(current))


def _is_model(choice: Any) -> bool:
    return isinstance(choice, type) and issubclass(choice, BaseModel)


def _choices(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, with Annotated, Optional and unions opened."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _choices(typing.get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for choice in typing.get_args(annotation) for inner in _choices(choice)]
    return [annotation]


def _item(annotation: Any) -> Any:
    """The type of the items of a tuple, list or dict annotation; Any when there is none."""
    for choice in _choices(annotation):
        arguments = typing.get_args(choice)
        if arguments:
            return arguments[-1] if typing.get_origin(choice) is dict else arguments[0]
    return Any


def _tagged(annotation: Any) -> dict[str, Any]:
    """Models of a union by the literal of their `type` field."""
    models = {}
    for choice in _choices(annotation):
        if _is_model(choice) and "type" in choice.model_fields:
            for literal in _choices(choice.model_fields["type"].annotation):
                if typing.get_origin(literal) is Literal:
                    models.update(dict.fromkeys(typing.get_args(literal), choice))
    return models
