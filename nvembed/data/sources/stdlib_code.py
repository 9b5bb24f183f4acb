"""Docstring -> function of the Python standard library. Files are parsed with `ast`, never imported.

The query is the docstring's first paragraph, the document the function without its docstring (and without those of
functions and classes inside it). What there is depends on the Python version; the manifest's licence line names it.
"""

from __future__ import annotations

import ast
import platform
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from nvembed.data.config import StdlibCodeSource
from nvembed.data.documents import Documents
from nvembed.data.sources.base import SourceRows, empty_splits, split_by_hash, tidy
from nvembed.data.tables import Document
from nvembed.types import ScoredId, TaskType, TrainingExample

EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"})
TEST_SHARE, DEV_SHARE = 0.2, 0.1
MIN_QUERY_WORDS = 3
SPLIT_RULE = (
    "by hash of the top-level module or package (20 % test, 10 % dev): queries and code of one module stay together"
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def read_stdlib_code(config: StdlibCodeSource) -> SourceRows:
    """Read every documented function with a body of its own."""
    root = Path(sysconfig.get_path("stdlib"))
    documents, examples = [], empty_splits()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED & set(relative.parts):
            continue
        module = relative.parts[0].removesuffix(".py")
        split = split_by_hash(module, salt="stdlib0", test_share=TEST_SHARE, dev_share=DEV_SHARE)
        for name, line, query, code in _documented_functions(path):
            identifier = f"{relative.as_posix()}:{line}:{name}"
            documents.append(Document(identifier, "", code))
            examples[split].append(
                TrainingExample(identifier, config.name, TaskType.RETRIEVAL, query, (ScoredId(identifier),))
            )
    return SourceRows(
        task=TaskType.RETRIEVAL,
        split_rule=SPLIT_RULE,
        licence=f"PSF-2.0 (standard library of CPython {platform.python_version()})",
        documents=Documents.of(documents),
        examples=examples,
        documents_split=True,
    )


def _documented_functions(path: Path) -> Iterator[tuple[str, int, str, str]]:
    """(name, line, first paragraph of the docstring, code without docstrings) of a file's functions."""
    source = path.read_bytes()
    try:
        tree = ast.parse(source)
        lines = source.decode("utf-8").splitlines()
    except (SyntaxError, ValueError):  # templates and files in another encoding: a handful, none with functions to find
        return
    for node in _definitions(tree):
        if not isinstance(node, Function):
            continue
        docstring = ast.get_docstring(node)
        query = tidy((docstring or "").split("\n\n")[0])
        if len(query.split()) < MIN_QUERY_WORDS or not _does_something(node.body[1:]):
            continue
        code = _without_docstrings(node, lines)
        if code is not None:
            yield node.name, node.lineno, query, code


def _definitions(tree: ast.AST) -> Iterator[Function | ast.ClassDef]:
    """Functions and classes inside a tree, reached through statements only (a third of the time of `ast.walk`)."""
    stack = [tree]
    while stack:
        node = stack.pop()
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            below = getattr(node, block, None)
            if not isinstance(below, list):  # the body of a lambda or of a conditional expression is one expression
                continue
            stack += below
            yield from (child for child in below if isinstance(child, Function | ast.ClassDef))


def _does_something(statements: list[ast.stmt]) -> bool:
    """False for bodies that only pass, raise NotImplementedError, or are an ellipsis."""
    return any(
        not isinstance(statement, ast.Pass | ast.Raise)
        and not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in statements
    )


def _without_docstrings(function: Function, lines: list[str]) -> str | None:
    """Source of a function with all its docstrings cut out; None where a docstring shares its line with code."""
    first, last = function.lineno, function.end_lineno or function.lineno
    dropped: set[int] = set()
    for node in (function, *_definitions(function)):
        if ast.get_docstring(node) is None:
            continue
        docstring = node.body[0]
        end = docstring.end_lineno or docstring.lineno
        following = node.body[1].lineno if len(node.body) > 1 else None
        if docstring.lineno == node.lineno or following == end:
            return None
        dropped.update(range(docstring.lineno, end + 1))
    code = [lines[number - 1].rstrip() for number in range(first, last + 1) if number not in dropped]
    return textwrap.dedent("\n".join(line for line in code if line))
