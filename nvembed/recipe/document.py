"""A recipe's text: YAML with a position for every value, and `--set a.b=c` on top.

Nothing is raised here: whatever is wrong becomes a `Problem`, so that the user gets all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from nvembed.core.validation import Path

_PLAIN = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


@dataclass(frozen=True)
class Position:
    """Where a key or value was written: line and column (1-based), or the `--set` it came from."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe."""

    position: Position
    path: Path
    message: str

    def __str__(self) -> str:
        return (
            f"{self.position}: {dotted(self.path)}: {self.message}" if self.path else f"{self.position}: {self.message}"
        )


@dataclass
class Document:
    """Plain values, and where each was written."""

    data: dict[str, Any]
    source: str
    keys: dict[Path, Position] = field(default_factory=dict)
    values: dict[Path, Position] = field(default_factory=dict)

    def position(self, path: Path, *, key: bool = False) -> Position:
        """Position of the value at a path, or of its key; of the nearest value around it if it is not written."""
        if key and path in self.keys:
            return self.keys[path]
        for end in range(len(path), -1, -1):
            if path[:end] in self.values:
                return self.values[path[:end]]
        return Position(self.source, 1, 1)

    def get(self, path: Path) -> Any:
        """The plain value at a path; None where there is none."""
        value: Any = self.data
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value


def dotted(path: Path) -> str:
    """`a.b.0` of a path."""
    return ".".join(map(str, path))


def parse(text: str, source: str, what: str = "recipe") -> tuple[Document, list[Problem]]:
    """Values, positions, and problems of the YAML itself: syntax, duplicate keys, values inside themselves.

    `what` names the kind of file in the messages: "recipe", "target".
    """
    document, problems = Document({}, source), list[Problem]()
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return document, [Problem(Position(source, 1, 1), (), f"the {what} is empty")]
        if not isinstance(node, yaml.MappingNode):
            return document, [
                Problem(_position(node, source), (), f"a {what} is a mapping of sections, not a list or text")
            ]
        document.data = _value(node, (), document, problems, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = Position(source, mark.line + 1, mark.column + 1) if mark else Position(source, 1, 1)
        why = " ".join(part for part in (error.problem, f"({error.context})" if error.context else "") if part)
        problems.append(Problem(position, (), f"not valid YAML: {why}"))
    except (yaml.YAMLError, ValueError) as error:  # a character YAML forbids; a date such as 2026-99-99
        problems.append(Problem(Position(source, 1, 1), (), f"not valid YAML: {str(error).splitlines()[0]}"))
    return document, problems


def _position(node: yaml.Node, source: str) -> Position:
    return Position(source, node.start_mark.line + 1, node.start_mark.column + 1)


def _value(
    node: yaml.Node, path: Path, document: Document, problems: list[Problem], around: tuple[yaml.Node, ...]
) -> Any:
    if node in around:
        problems.append(Problem(_position(node, document.source), path, "refers to a value it is part of"))
        return None
    document.values[path] = _position(node, document.source)
    if isinstance(node, yaml.CollectionNode) and node.tag not in _PLAIN:
        problems.append(Problem(_position(node, document.source), path, f"a YAML tag ({node.tag}); write plain values"))
        return None
    if isinstance(node, yaml.SequenceNode):
        items = enumerate(node.value)
        return [_value(item, (*path, index), document, problems, (*around, node)) for index, item in items]
    if not isinstance(node, yaml.MappingNode):
        return yaml.SafeLoader("").construct_object(node)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        here, position = (*path, key), _position(key_node, document.source)
        if key in mapping:
            first = document.keys[here].line
            problems.append(Problem(position, here, f"written twice (first on line {first}); keep one"))
            continue
        document.keys[here] = position
        mapping[key] = _value(value_node, here, document, problems, (*around, node))
    return mapping


def override(document: Document, settings: Sequence[str]) -> list[Problem]:
    """Put `a.b=c` settings into the document, in order; `c` is YAML, list items are numbers (`prepare.sources.0`)."""
    problems = []
    for setting in settings:
        position = Position(f"--set {setting}")
        name, equals, text = setting.partition("=")
        path: Path = tuple(part.strip() for part in name.split("."))
        if not equals or not all(path):
            problems.append(Problem(position, (), "write --set section.key=value"))
            continue
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            problems.append(Problem(position, path, f"the value is not valid YAML: {str(error).splitlines()[0]}"))
            continue
        problems += _put(document, path, value, position)
    return problems


def _put(document: Document, path: Path, value: Any, position: Position) -> list[Problem]:
    target: Any = document.data
    real: Path = ()
    for index, part in enumerate(path):
        last = index == len(path) - 1
        if isinstance(target, list):
            if not str(part).isdigit() or int(part) >= len(target):
                return [
                    Problem(
                        position,
                        path[: index + 1],
                        f"{dotted(real)} is a list; write a number from 0 to {len(target) - 1}",
                    )
                ]
            part = int(part)
        elif not isinstance(target, dict):
            return [
                Problem(position, path[: index + 1], f"{dotted(real)} is {target!r}, not a section; it has no keys")
            ]
        real = (*real, part)
        if last:
            for known in [known for known in document.values if known[: len(real)] == real]:
                del document.values[known]
            target[part] = value
        elif isinstance(target, dict) and target.get(str(part)) is None:
            target[part] = {}
        target = target[part]
        if last or real not in document.values:
            document.values[real] = document.keys[real] = position
    return []
