"""The public API: what `nvembed` exports is documented by an example, and the example runs."""

import doctest
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from artifacts import tiny_folder

import nvembed

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
TEXTS = ["how to sort a list", "lists are sorted in place", "bread is baked in an oven"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("api") / "model", TEXTS)


def run_examples(name: str, exported: Callable[..., object]) -> tuple[int, str]:
    """How many lines of examples an exported name has, and what its doctests report of failures."""
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    lines = 0
    for test in doctest.DocTestFinder().find(exported, name, globs={}):
        lines += len(test.examples)
        runner.run(test, out=output.append)
    return lines, "".join(output)


@pytest.mark.parametrize("name", nvembed.__all__)
def test_every_export_has_an_example_that_runs(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An example starts in a folder with `pipelines/` and a small model folder, `model`, and imports what it uses."""
    exported = getattr(nvembed, name)
    assert "Example:" in (exported.__doc__ or ""), f"nvembed.{name} has no Example: section"
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "pipelines").symlink_to(Path(__file__).parents[1] / "pipelines")
    monkeypatch.chdir(tmp_path)
    lines, failures = run_examples(name, exported)
    assert failures == ""
    assert lines >= 2, "an example imports the function and calls it"


def test_a_wrong_example_is_found() -> None:
    def wrong() -> None:
        """Example:

        >>> 1 + 1
        3
        """

    lines, failures = run_examples("wrong", wrong)
    assert lines == 1 and "Expected:\n    3\nGot:\n    2\n" in failures


def test_importing_the_package_loads_nothing_heavy() -> None:
    import subprocess

    code = "import sys, nvembed; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
