"""Words and sizes of the library: plain English in first lines, few vague variables, no module without a reason.

Standard library only. The words are those of `nvembed/README.md`; this file lists what is not used any more.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "nvembed").rglob("*.py"))
CODE = [*LIBRARY, *sorted((ROOT / "pipelines").rglob("*.py"))]

BANNED = re.compile(
    r"\b(whoever|somebody|nobody|stands? for|stands in|stor(y|ies)|roads?|lanes?|tells?|told|walk(s|ed)?|laid|remine"
    r"|miners?|teach(es)?)\b",
    re.IGNORECASE,
)
VAGUE, MAX_VAGUE = re.compile(r"\b(found|said|told|asked|kept|held)\b", re.IGNORECASE), 500
MAX_LOOSE, MAX_MINING, MIN_LINES = 4, 13, 60

# Modules under `MIN_LINES` lines other than config.py, __init__.py and commands/*, with the reason for each.
SHORT = {
    "nvembed/cli.py": "the entry point: loads a command only when it is given",
    "nvembed/core/ray_cluster.py": "the one place that starts or joins Ray",
    "nvembed/core/runtime.py": "the process itself: revision, freed memory, progress bars",
    "nvembed/jobs/submit.py": "imports every backend, and every backend imports backend.py",
    "nvembed/losses/distillation.py": "one objective; torch only",
    "nvembed/losses/matryoshka.py": "prefixes of embeddings, shared by all objectives; torch only",
    "nvembed/modeling/bidirectional.py": "goes into exported model folders as code",
    "nvembed/modeling/exports/stock.py": "the one place that may run a folder's own code",
    "nvembed/modeling/pooling.py": "goes into exported model folders as code",
    "nvembed/pipeline/steps.py": "pipeline files list steps by it without loading torch",
    "nvembed/recipe/diff.py": "shared by a command and the report",
    "nvembed/report/attempts.py": "read here, below the pipeline that writes the file",
    "nvembed/preflight/findings.py": "imports nothing: jobs, pipeline and all checks share it",
    "nvembed/training/errors.py": "shared by the loop and by the launcher, which loads no torch",
}


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def first_lines(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """First lines of the docstrings of a module and its public functions and classes; descriptions of config keys."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and not getattr(node, "name", "").startswith("_"):
                yield node.body[0].lineno, docstring.splitlines()[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Field":
            for keyword in node.keywords:
                if keyword.arg == "description" and isinstance(keyword.value, ast.Constant):
                    yield keyword.value.lineno, str(keyword.value.value)


def word_faults(paths: list[Path]) -> list[str]:
    return [
        f"{place(path)}:{line}: {match[0]!r} in: {text}"
        for path in paths
        for line, text in first_lines(ast.parse(path.read_text(encoding="utf-8")))
        if (match := BANNED.search(text))
    ]


def short_modules() -> set[str]:
    return {
        place(path)
        for path in LIBRARY
        if path.name not in ("__init__.py", "config.py")
        and path.parent.name != "commands"
        and path.read_text(encoding="utf-8").count("\n") < MIN_LINES
    }


def test_first_lines_and_descriptions_are_plain_english() -> None:
    assert word_faults(CODE) == []


def test_the_word_test_finds_faults(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        '"""What the loop asks of whoever runs it."""\n'
        'class A:\n    """A pipeline.\n\n    Second lines may tell a story."""\n'
        '    key: int = Field(1, description="Rows that " "nobody reads.")\n'
        'def f():\n    """Stands for a step."""\n'
        'def _g():\n    """A story."""\n'
        'async def h():\n    """Untold times beside the roadside."""\n'
    )
    assert sorted(int(fault.split(":")[1]) for fault in word_faults([bad])) == [1, 6, 8]


def test_variables_and_prose_name_the_thing() -> None:
    """Not the act: `cached_vectors`, not `found`."""
    counts = {place(path): len(VAGUE.findall(path.read_text(encoding="utf-8"))) for path in LIBRARY}
    most = sorted(counts.items(), key=lambda item: -item[1])[:20]
    assert sum(counts.values()) <= MAX_VAGUE, f"{sum(counts.values())} times; most in {most}"


def test_few_modules_lie_loose_and_mining_stays_small() -> None:
    loose = [place(path) for path in LIBRARY if path.parent == ROOT / "nvembed"]
    mining = [place(path) for path in LIBRARY if path.parent == ROOT / "nvembed/mining"]
    assert len(loose) <= MAX_LOOSE, loose
    assert len(mining) <= MAX_MINING, mining


def test_small_modules_have_a_reason() -> None:
    assert sorted(short_modules() - set(SHORT)) == [], "merge these, or give the reason in SHORT"
    assert sorted(set(SHORT) - short_modules()) == [], "these are gone or have grown: drop them from SHORT"
