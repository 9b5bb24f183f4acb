"""The house rules that a machine can check: layers, fences, names, bans. Standard library only."""

import ast
import functools
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANKS = (
    ("types",), ("core",), ("text", "losses"), ("modeling", "data"), ("retrieval", "stream", "tracking"),
    ("training", "mining", "evaluation"), ("distill", "registry"), ("serve",), ("recipe",), ("plan", "report"),
    ("preflight",), ("pipeline", "jobs"), ("commands",), ("cli",),
)  # fmt: skip
LAYERS = {room: number for number, rooms in enumerate(RANKS) for room in rooms}
PIPELINES = len(RANKS)
HEAVY = ("torch", "ray", "mlflow", "transformers", "deepspeed", "datasets", "sentence_transformers")
WITHOUT_CONFIG = (
    "core",
    "recipe",
    "pipeline",
    "report",
    "commands",
    "plan",
    "preflight",
    "__pycache__",
)  # set by the recipe or the command line
MAX_MODULE, MAX_FUNCTION = 400, 60


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every absolute module name that a file imports, wherever in the file, with its line."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room(module: str) -> str | None:
    """The part of the library a module belongs to: `data` of `nvembed.data.sources.cwe`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "nvembed" and len(parts) > 1 else None


LIBRARY, PIPELINE_FILES = sources("nvembed"), sources("pipelines")


def test_every_room_has_a_layer() -> None:
    rooms = {room(module_name(path)) for path in LIBRARY} - {None}
    assert rooms <= set(LAYERS), f"give these a layer: {sorted(rooms - set(LAYERS))}"
    assert rooms >= {"types", "text", "modeling", "retrieval", "mining", "distill", "pipeline"}


def layer_faults(paths: list[Path]) -> list[str]:
    faults = []
    for path in paths:
        ours = room(module_name(path))
        layer = LAYERS[ours] if ours is not None else PIPELINES if path.parts[-2] == "pipelines" else None
        for name, line in imports(path):
            other = room(name)
            if other is None or other == ours or other not in LAYERS or layer is None:
                continue
            if LAYERS[other] > layer:
                faults.append(f"{path}:{line}: {ours} (layer {layer}) imports {other} (layer {LAYERS[other]})")
            elif LAYERS[other] == layer:
                faults.append(f"{path}:{line}: {ours} and {other} are of one layer ({layer})")
    return faults


def test_imports_go_down_only() -> None:
    assert layer_faults([*LIBRARY, *PIPELINE_FILES]) == []


def test_the_layer_test_finds_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for name, text in (
        ("text", "from nvembed.data import tables"),
        ("mining", "def f():\n    import nvembed.evaluation"),
    ):
        (tmp_path / "nvembed" / name).mkdir(parents=True)
        (tmp_path / "nvembed" / name / "x.py").write_text(text)
    faults = layer_faults(sorted(tmp_path.rglob("*.py")))
    assert len(faults) == 3 and "of one layer" in faults[0] and "text (layer 2) imports data (layer 3)" in faults[1]


def fence_faults(package: str, allowed: list[str]) -> list[str]:
    faults = []
    for path in [*LIBRARY, *PIPELINE_FILES]:
        place = path.relative_to(ROOT).as_posix()
        if not any(place.startswith(prefix) for prefix in allowed):
            hits = [line for name, line in imports(path) if name.split(".")[0] == package]
            faults += [f"{place}:{line} imports {package}" for line in hits]
    return faults


def test_fence_of_deepspeed() -> None:
    assert fence_faults("deepspeed", ["nvembed/training/engine"]) == []


def test_fence_of_mlflow() -> None:
    assert fence_faults("mlflow", ["nvembed/tracking/", "nvembed/registry/"]) == []


def test_fence_of_ray() -> None:
    forbidden = ("nvembed/text/", "nvembed/modeling/", "nvembed/losses/", "nvembed/training/loop.py")
    places = [path.relative_to(ROOT).as_posix() for path in LIBRARY]
    assert all(any(place.startswith(prefix) for place in places) for prefix in forbidden), "a fenced room has moved"
    faults = [fault for fault in fence_faults("ray", []) if fault.startswith(forbidden)]
    assert faults == []


@pytest.mark.parametrize("path", [ROOT / "nvembed/types.py", *sources("nvembed/core")], ids=lambda path: path.stem)
def test_the_foundation_imports_nothing_heavy(path: Path) -> None:
    names = [node for node in parsed(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.name for node in names if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in names if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in imported} & set(HEAVY)


def test_config_modules_import_pydantic_and_each_other_only() -> None:
    configs = [path for path in LIBRARY if path.name == "config.py"]
    packages = [path for path in (ROOT / "nvembed").iterdir() if path.is_dir() and path.name not in WITHOUT_CONFIG]
    assert {path.parent.name for path in configs} == {path.name for path in packages}, "every package owns a config.py"
    faults = []
    for path in configs:
        for name, line in imports(path):
            good = name.split(".")[0] in ("typing", "pydantic", "__future__", "enum") or name.startswith(
                "nvembed.types"
            )
            good |= name.startswith("nvembed.") and name.split(".")[2:3] == ["config"]
            faults += [] if good else [f"{path}:{line}: {name}"]
    assert faults == []


def test_package_files_hold_a_docstring_and_lazy_exports_only() -> None:
    """Importing a package costs nothing: what it exports is imported by `__getattr__`, when it is first used."""
    for path in LIBRARY:
        if path.name == "__init__.py":
            body = parsed(path).body
            docstring = body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
            light = [
                node
                for node in body[1:]
                if isinstance(node, ast.ImportFrom) and node.module in ("__future__", "typing")
            ]
            functions = [node for node in body[1:] if isinstance(node, ast.FunctionDef)]
            lazy = [node for node in functions if node.name in ("__getattr__", "__dir__")]
            assigned = [node for node in body[1:] if isinstance(node, ast.Assign)]
            assert docstring and len(light) + len(lazy) + len(assigned) == len(body) - 1, path


def test_functions_and_modules_do_not_share_a_name() -> None:
    clashes = []
    for path in LIBRARY:
        package = path.parent
        modules = {other.stem for other in package.glob("*.py")} | {
            other.name for other in package.iterdir() if other.is_dir()
        }
        for node in parsed(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and node.name in modules:
                clashes.append(f"{path}:{node.lineno}: {node.name}")
    assert clashes == []


def test_modules_and_functions_stay_readable() -> None:
    long = []
    for path in LIBRARY:
        lines = path.read_text(encoding="utf-8").count("\n")
        long += [f"{path}: {lines} lines"] if lines > MAX_MODULE else []
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                long += [f"{path}:{node.lineno}: {node.name} has {length} lines"] if length > MAX_FUNCTION else []
    assert long == []


def test_pipelines_are_short_and_hold_no_logic() -> None:
    assert PIPELINE_FILES, "no pipeline found"
    for path in PIPELINE_FILES:
        assert path.read_text(encoding="utf-8").count("\n") <= 80, path
        loops = [
            node for node in ast.walk(parsed(path)) if isinstance(node, ast.For | ast.While | ast.Try | ast.ClassDef)
        ]
        assert not loops, f"{path}: a pipeline is a list of steps"


def test_every_module_says_what_it_is() -> None:
    assert [str(path) for path in [*LIBRARY, *PIPELINE_FILES] if not ast.get_docstring(parsed(path))] == []


# -- dependencies -----------------------------------------------------------------------------------------------------

DISTRIBUTIONS = {"yaml": "pyyaml", "sklearn": "scikit-learn", "faiss": "faiss-cpu", "google": "google-auth"}


def undeclared(paths: list[Path], declared: set[str], own: set[str]) -> list[str]:
    """Imports of packages that pyproject.toml does not name: they are there by the grace of other packages."""
    faults = []
    for path in paths:
        for name in {name.split(".")[0] for name, _ in imports(path)} - own - set(sys.stdlib_module_names):
            if DISTRIBUTIONS.get(name, name).replace("_", "-").lower() not in declared:
                faults.append(f"{path}: {name}")
    return sorted(faults)


def declared_names(*, test: bool) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [lines for name, lines in project["optional-dependencies"].items() if test or "test" not in name]
    lines = itertools.chain(project["dependencies"], *extras)
    return {re.match(r"[A-Za-z0-9._-]+", line)[0].replace("_", "-").lower() for line in lines}


def test_what_is_imported_is_declared() -> None:
    assert undeclared([*LIBRARY, *PIPELINE_FILES], declared_names(test=False), {"nvembed"}) == []
    tests = [path for path in sources("tests") if "assets" not in path.parts]
    assert undeclared(tests, declared_names(test=True), {"nvembed", *(path.stem for path in tests)}) == []


def test_the_test_of_dependencies_finds_faults(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import os, yaml\ndef f():\n    from werkzeug.serving import make_server\n")
    assert undeclared([tmp_path / "x.py"], {"pyyaml"}, set()) == [f"{tmp_path / 'x.py'}: werkzeug"]


# -- bans -------------------------------------------------------------------------------------------------------------


# An export is measured as its users run it, where all code in it is our own to the byte. Code of a version, run by
# the process that loads its pyfunc, trusts the folder's own modules if their checksums are right.
TRUSTING = ("nvembed/modeling/exports/stock.py", "nvembed/registry/serving.py")


def ban_faults(tree: ast.Module) -> list[tuple[int, str]]:
    """Calls that run what a file says: unpickling, torch.load without weights_only, remote code."""
    faults = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if called.split(".")[0] in ("pickle", "cloudpickle", "joblib", "dill") and called.endswith(("load", "loads")):
            faults.append((node.lineno, called))
        if called in ("eval", "exec", "os.system") or (called == "yaml.load"):
            faults.append((node.lineno, called))
        weights_only = options.get("weights_only")
        if called == "torch.load" and not (isinstance(weights_only, ast.Constant) and weights_only.value is True):
            faults.append((node.lineno, "torch.load without weights_only=True"))
        remote = options.get("trust_remote_code")
        if remote is not None and not (isinstance(remote, ast.Constant) and remote.value is False):
            faults.append((node.lineno, "trust_remote_code"))
    return faults


def test_nothing_runs_what_a_file_says() -> None:
    found = [
        (path.relative_to(ROOT).as_posix(), what)
        for path in [*LIBRARY, *PIPELINE_FILES]
        for _, what in ban_faults(parsed(path))
    ]
    assert found == [(path, "trust_remote_code") for path in TRUSTING]


@pytest.mark.parametrize(
    "text",
    [
        "pickle.loads(x)", "torch.load(p)", "torch.load(p, weights_only=False)", "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)", "yaml.load(x)", "eval(x)",
    ],
)  # fmt: skip
def test_the_ban_test_finds_faults(text: str) -> None:
    assert len(ban_faults(ast.parse(text))) == 1
    assert (
        ban_faults(ast.parse("torch.load(p, weights_only=True); f(trust_remote_code=False); yaml.safe_load(x)")) == []
    )


# -- light commands ---------------------------------------------------------------------------------------------------

LIGHT = """
import sys
sys.argv = ["nvembed", *{arguments!r}]
from nvembed.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
heavy = [name for name in {heavy!r} if name in sys.modules]
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["embed", "--help"],
        ["report", "--help"],
        ["registry", "promote", "--help"],
        ["recipe", "validate", "RECIPE"],
        ["recipe", "show", "RECIPE"],
        *(
            ["submit", f"cluster/{target}.yaml", "--dry-run", "--", "python", "pipelines/quickstart.py", "TINY"]
            for target in ("ray", "kuberay", "slurm", "aws")
        ),
        ["preflight", "--help"],
        ["search", "--help"],
        ["recipe", "schema"],
        ["recipe", "diff", "RECIPE", "RECIPE"],
        ["plan", "RECIPE"],
        ["export", "--help"],
        ["import", "--help"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_light_commands_load_nothing_heavy(arguments: list[str]) -> None:
    recipes = {"RECIPE": "pipelines/recipes/quickstart.yaml", "TINY": "pipelines/recipes/tiny.yaml"}
    script = LIGHT.format(arguments=[recipes.get(part, part) for part in arguments], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_report_loads_neither_torch_nor_scipy() -> None:
    """Every run ends with it: they would take most of its time."""
    script = (
        "import importlib, pkgutil, sys\nfrom nvembed import report\n"
        "for part in pkgutil.iter_modules(report.__path__): importlib.import_module(f'nvembed.report.{part.name}')\n"
        f"assert not set(sys.modules) & {{'scipy', *{HEAVY!r}}}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
