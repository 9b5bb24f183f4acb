"""`--dry-run`: every value with its source, the plan, and nothing touched: no file, no socket, no process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from nvembed.core.secrets import mask, mask_all
from nvembed.plan.dry_run import recipe_lines, source_of, sources
from nvembed.recipe.schema import RecipeError, load_recipe, read_recipe

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "pipelines/recipes/tiny.yaml"
RECIPES = sorted((ROOT / "pipelines/recipes").glob("*.yaml"))

# Watches every call of the interpreter that could touch something: opens for writing, directories, sockets, processes.
WATCHED = """
import os, runpy, sys
seen = []
WRITES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod",
          "os.utime", "shutil.rmtree", "shutil.move", "tempfile.mkdtemp", "subprocess.Popen", "os.fork", "os.exec"}
TEMPORARY = os.environ["TMPDIR"]
def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        # a descriptor is a copy of standard error; Python itself tries whether it can write to the temporary directory
        writes = flags & 3 or set(mode or "") & set("wax+")
        if isinstance(path, str) and writes and not path.startswith(("/dev/", TEMPORARY)):
            seen.append(f"open {path} {mode}")
    elif event == "os.remove" and str(arguments[0]).startswith(TEMPORARY):
        pass
    elif event in WRITES or event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        seen.append(f"{event} {arguments}")
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
sys.dont_write_bytecode = True
sys.addaudithook(watch)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    code = ended.code
heavy = [name for name in ("ray", "mlflow", "deepspeed", "transformers") if name in sys.modules]
import json
sys.stderr.write(json.dumps({"code": code, "seen": seen, "heavy": heavy}))
"""


def snapshot(*folders: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder with its size, modification and change times; of the temporary directory its content."""
    files: dict[str, tuple[int, int, int]] = {}
    for folder in folders:
        for path in (folder, *sorted(folder.rglob("*"))):
            stat = path.lstat()
            times = (0, 0) if path.name == "temporary" else (stat.st_mtime_ns, stat.st_ctime_ns)
            files[str(path)] = (stat.st_size, *times)
    return files


def sockets() -> set[tuple[Any, ...]]:
    """Sockets of this process and everything below it."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return {(p.pid, c.laddr, c.raddr, c.status) for p in family for c in p.net_connections(kind="all")}


def dry_run(folder: Path, pipeline: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """What was seen by the hook, and standard output; home and temporary directory are inside `folder`."""
    for name in ("home", "temporary", "here"):
        (folder / name).mkdir(exist_ok=True)
    environment = os.environ | {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", WATCHED, str(ROOT / "pipelines" / pipeline), *arguments, "--dry-run"]
    before, connected = snapshot(folder, ROOT / "pipelines" / "recipes"), sockets()
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder / "here", env=environment, timeout=120)
    assert snapshot(folder, ROOT / "pipelines" / "recipes") == before, "the file system is as it was"
    assert sockets() == connected
    return json.loads(done.stderr.splitlines()[-1]), done.stdout


def test_a_dry_run_touches_no_file_and_no_socket(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "prepare").mkdir(parents=True)
    (out / "steps.json").write_text('{"attempts": []}')
    (out / ".lease.json").write_text("{}")
    seen, output = dry_run(tmp_path, "quickstart.py", str(TINY), "--out", str(out))
    assert seen == {"code": 0, "seen": [], "heavy": []}
    assert re.search(rf"train_student +run +{out}/train_student\n", output)


@pytest.mark.slow
def test_a_7b_recipe_has_a_dry_run_without_a_trace(tmp_path: Path) -> None:
    seen, output = dry_run(tmp_path, "nv_embed.py", str(ROOT / "pipelines/recipes/nv_embed_v1_7b.yaml"), "--json")
    assert seen == {"code": 0, "seen": [], "heavy": []}
    plan = json.loads(output)
    assert plan["stages"]["stage_1"]["parameters"] == 7_851_016_192 + 41_943_040
    assert plan["stages"]["stage_1"]["deepspeed"]["zero_optimization"]["stage"] == 3


def test_json(tmp_path: Path) -> None:
    seen, output = dry_run(
        tmp_path, "quickstart.py", str(TINY), "--json", "--set", "tracking.uri=https://mlflow.example/"
    )
    assert seen["seen"] == []
    plan = json.loads(output)
    assert plan["sources"]["tracking.uri"].startswith("--set tracking.uri=https://mlflow.example/")
    assert (
        plan["sources"]["stage_1.train.seed"] == "tiny.yaml:42" and plan["sources"]["cluster.local_cpus"] == "default"
    )
    assert plan["stages"]["stage_2"]["memory_bytes_per_rank"]["total"] > 0
    assert plan["steps"][0] == {"name": "prepare", "what": "run", "uri": f"{tmp_path}/here/runs/tiny/prepare"}


def test_an_output_out_of_reach_leaves_the_steps_unknown(tmp_path: Path) -> None:
    _, output = dry_run(tmp_path, "quickstart.py", str(TINY), "--out", "nosuch://bucket/run")
    assert "# a run from here would end with exit code 3: nosuch://bucket/run cannot be reached" in output
    steps = output.split("# steps, below nosuch://bucket/run\n")[1].splitlines()[1:]
    assert {line.split()[1] for line in steps if not line.startswith("report ")} == {"unknown"} and len(steps) > 15


def test_a_secret_in_a_recipe_is_refused_without_being_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary-of-the-environment")
    settings = [
        "tracking.uri=https://me:canary-password@mlflow.example/?token=canary-token",
        "description=hf_abcdefghijklmnopqrst canary-of-the-environment",
    ]
    with pytest.raises(RecipeError, match="MY_API_KEY") as caught:
        read_recipe(str(TINY), settings)
    assert "canary" not in str(caught.value) and len(caught.value.problems) == 2
    with pytest.raises(RecipeError, match="shape of an access token") as caught:
        read_recipe(str(TINY), ["description=hf_abcdefghijklmnopqrst"])
    assert "hf_abc" not in str(caught.value) and len(caught.value.problems) == 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_written_value_has_its_line(path: Path) -> None:
    recipe, document = read_recipe(str(path))
    text = path.read_text().splitlines()
    origins = sources(recipe, document)
    for name, source in origins.items():
        if source != "default":
            line = text[int(source.rsplit(":", 1)[1]) - 1]
            key = [part for part in name.split(".") if not part.isdigit()][-1]
            assert key in line or "-" in line, (name, source)
    assert "default" in origins.values()


def test_the_shown_recipe_is_the_recipe(tmp_path: Path) -> None:
    recipe, document = read_recipe(str(TINY), ["initialise.backbone={type: random, hidden_size: 32}", "mine.depth=31"])
    lines = recipe_lines(recipe, document)
    (tmp_path / "shown.yaml").write_text("\n".join(lines))
    assert load_recipe(str(tmp_path / "shown.yaml")) == recipe
    assert source_of(document, ("initialise", "backbone", "hidden_size")).startswith("--set initialise.backbone={")
    assert source_of(document, ("initialise", "backbone", "num_layers")) == "default"
    assert any(re.fullmatch(r"  depth: 31 +# --set mine\.depth=31", line) for line in lines)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("s3://key:secret@bucket/a", "s3://key:****@bucket/a"),
        ("postgresql+psycopg2://u:p@db:5432/x", "postgresql+psycopg2://u:****@db:5432/x"),
        ("https://h/x?a=1&X-Amz-Signature=abc&b=2", "https://h/x?a=1&X-Amz-Signature=****&b=2"),
        ("AKIAABCDEFGHIJKLMNOP", "****"),
        ("runs/quickstart, me@example.org, token_budget: 512", "runs/quickstart, me@example.org, token_budget: 512"),
    ],
)
def test_masks(text: str, masked: str) -> None:
    assert mask(text, {}) == masked


def test_masks_of_the_environment() -> None:
    environment = {"HF_TOKEN": "abcdefgh", "A_PASSWORD": "abc", "RAY_AUTH_TOKEN_PATH": "/home/me/token"}
    assert mask("abcdefgh abc /home/me/token", environment) == "**** abc /home/me/token"
    assert mask_all({"a": ["s3://k:s@b", 1, None]}) == {"a": ["s3://k:****@b", 1, None]}
