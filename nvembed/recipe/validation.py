"""Pydantic's errors as problems for users: path, line, value, what is allowed, nearest match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from nvembed.core.validation import (
    alternatives,
    describe_error,
    is_model,
    tagged_models,
    unknown_key,
    why_out_of_bounds,
)
from nvembed.recipe.document import Document, Path, Problem


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
    if inner is None and (problems := _out_of_bounds(value, path, document)):
        return problems
    if inner is not None and (problems := _section(inner, path, document, sections)):
        return problems
    annotated: Any = Annotated[(info.annotation, info)]  # with the field's constraints
    try:
        sections[path] = TypeAdapter(annotated).validate_python(value)
    except ValidationError as error:
        return [_problem(detail, path, annotated, document) for detail in error.errors()]
    return []


def _out_of_bounds(value: Any, path: Path, document: Document) -> list[Problem]:
    """Plain values, of lists and mappings too, that no key may have."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return [problem for key, item in items for problem in _out_of_bounds(item, (*path, key), document)]
    why = why_out_of_bounds(value)
    return [Problem(document.position(path), path, why)] if why else []


def _model_of(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The model of a mapping: the annotation's only one, or the one that its `type` names."""
    if not isinstance(value, Mapping):
        return None
    tagged = tagged_models(annotation)
    if tagged:
        return tagged.get(value.get("type"))  # type: ignore[arg-type]
    models = [choice for choice in alternatives(annotation) if is_model(choice)]
    return models[0] if len(models) == 1 else None


def _problem(error: Mapping[str, Any], section: Path, annotation: Any, document: Document) -> Problem:
    path, message, of_key = describe_error(error, section, annotation, document.get)
    return Problem(document.position(path, key=of_key), path, message)


def _unknown(document: Document, path: Path, allowed: Sequence[str]) -> Problem:
    return Problem(document.position(path, key=True), path, unknown_key(str(path[-1]), allowed))
