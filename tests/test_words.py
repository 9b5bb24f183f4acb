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
TESTS = sorted((ROOT / "tests").rglob("*.py"))
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted(path for path in (ROOT / "nvembed").glob("*.md") if path.name != "DECISIONS.md"),
    *sorted(path for path in (ROOT / "cluster").iterdir() if path.name != "requirements.lock"),
    *sorted(path for path in (ROOT / "pipelines").rglob("*") if path.suffix in (".md", ".yaml")),
    *sorted((ROOT / "tests").glob("*/README.md")),
]

BANNED = re.compile(
    r"\b(whoever|somebody|nobodys?|stands?|stood|stor(y|ies)|roads?|lanes?|tells?|told|walk(s|ed)?|laid|remine"
    r"|miners?|teach(es)?|judged?|judges|passages?|sides?)\b",
    re.IGNORECASE,
)
VAGUE, MAX_VAGUE = re.compile(r"\b(found|said|told|asked|kept|held)\b", re.IGNORECASE), 500
MAX_LOOSE, MAX_MINING, MIN_LINES = 4, 13, 60

# Modules under `MIN_LINES` lines other than config.py, __init__.py and commands/*, with the reason for each.
SHORT = {
    "nvembed/cli.py": "the entry point: loads a command only when it is given",
    "nvembed/core/messages.py": "wording shared by rooms that may not import each other",
    "nvembed/jobs/submit.py": "imports every backend, and every backend imports backend.py",
    "nvembed/losses/distillation.py": "one objective; torch only",
    "nvembed/losses/matryoshka.py": "prefixes of embeddings, shared by all objectives; torch only",
    "nvembed/modeling/bidirectional.py": "goes into exported model folders as code",
    "nvembed/core/lines.py": "sources of data and searched files both read foreign lines",
    "nvembed/modeling/exports/stock.py": "the one place that may run a folder's own code",
    "nvembed/modeling/pooling.py": "goes into exported model folders as code",
    "nvembed/pipeline/steps.py": "pipeline files list steps by it without loading torch",
    "nvembed/recipe/diff.py": "shared by a command and the report",
    "nvembed/preflight/findings.py": "imports nothing: jobs, pipeline and all checks share it",
    "nvembed/training/errors.py": "shared by the loop and by the launcher, which loads no torch",
}

# First lines that are no sentence: sentence_modules.py is copied into model folders, so a change changes their content.
BROKEN = {"nvembed/modeling/sentence_modules.py:sentence_modules"}


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, int, str]]:
    """Name, line and first line of the docstrings of a module and its public functions and classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name, docstring = getattr(node, "name", module), ast.get_docstring(node)
            if docstring and not name.startswith("_"):
                yield name, node.body[0].lineno, docstring.splitlines()[0]


def first_lines(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """First lines of the docstrings of a module and its public functions and classes; descriptions of config keys."""
    yield from ((line, text) for _, line, text in docstrings(tree, "module"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Field":
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


def misnamed_tests(paths: list[Path]) -> set[str]:
    """`module:name` of test functions whose names have such words."""
    return {
        f"{place(path)}:{node.name}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and BANNED.search(node.name.replace("_", " "))
    }


def document_faults(paths: list[Path]) -> list[str]:
    """Lines of documents, recipes and cluster files with such words."""
    return [
        f"{place(path)}:{number}: {match[0]!r} in: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if (match := BANNED.search(line))
    ]


def broken_first_lines(paths: list[Path]) -> set[str]:
    """`module:name` of docstrings whose first line is no sentence of its own, or a question ("What ...")."""
    return {
        f"{place(path)}:{name}"
        for path in paths
        for name, _, text in docstrings(ast.parse(path.read_text(encoding="utf-8")), path.stem.strip("_"))
        if not text.endswith((".", ":")) or text.startswith("What ")
    }


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


def test_names_of_tests_are_plain_english() -> None:
    assert sorted(misnamed_tests(TESTS)) == []


def test_documents_are_plain_english() -> None:
    assert document_faults(DOCUMENTS) == []


def test_the_tests_of_names_and_documents_find_faults(tmp_path: Path) -> None:
    bad, page = tmp_path / "bad.py", tmp_path / "page.md"
    bad.write_text("def test_mistakes_are_told():\n    pass\ndef test_beside():\n    told = 1\n")
    page.write_text("The run stops.\nThe run is told to stop.\n")
    assert misnamed_tests([bad]) == {"bad.py:test_mistakes_are_told"}
    assert [fault.split(" ")[0] for fault in document_faults([page])] == ["page.md:2:"]


def test_first_lines_are_sentences() -> None:
    """The first sentence of a docstring ends on its line, so that it can be read at once."""
    assert sorted(broken_first_lines(LIBRARY) - BROKEN) == []
    assert sorted(BROKEN - broken_first_lines(LIBRARY)) == [], "these are sentences: drop them from BROKEN"


def test_the_sentence_test_finds_faults(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        '"""What a recipe needs."""\n'
        'class A:\n    """A pipeline whose first sentence\n    ends here."""\n'
        '    def b(self):\n        """Layout:\n\n        a list."""\n'
        '    def c(self):\n        """Whatever it is."""\n'
        'def _d():\n    """A sentence that\n    goes on."""\n'
        'async def e():\n    """Rows"""\n'
    )
    assert broken_first_lines([bad]) == {"bad.py:bad", "bad.py:A", "bad.py:e"}


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
