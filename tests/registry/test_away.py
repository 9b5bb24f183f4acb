"""A registry that is away while a pipeline runs: the exit code names what is pending, and the next run does it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvembed.registry.client import aliases, list_versions, open_registry

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "pipelines/recipes/tiny.yaml"
NAME = "nvembed-tiny-teacher"
TOY = '''
"""A toy pipeline: something to register, and a step after it."""
import json, shutil
from pathlib import Path
import pyarrow as pa
from nvembed.core import storage
from nvembed.core.parquet import write_table
from nvembed.core.steps import Step, StepResult
from nvembed.pipeline.command_line import main
from nvembed.pipeline.declaration import Pipeline

def model(config, inputs, uri):
    shutil.copytree(FOLDER, Path(uri, "model"))
    return StepResult()

def scores(config, inputs, uri):
    rows = {"ndcg_at_10": {"value": 0.5, "low": 0.4, "high": 0.6}}
    storage.write_json(uri + "/scores.json", {"evaluation_hash": {"cwe": "a"}, "scores": {"model": {"cwe": rows}}})
    write_table(pa.table({"system": ["model"]}), uri + "/items.parquet")
    return StepResult()

def last(config, inputs, uri):
    GIVE_BACK
    return StepResult()

def toy(run):
    """Three steps and a registration."""
    made = run.step("made", Step("prepare", 1, model), run.recipe.prepare)
    scored = run.step("scored", Step("initialise", 1, scores), run.recipe.prepare, model=made)
    run.register("register_teacher", run.recipe.register.teacher_name, model=made, scores=scored)
    run.step("last", Step("student_init", 1, last), run.recipe.prepare, made=made)
    run.report()

PIPELINE = Pipeline(toy, recipe="toy.yaml")

if __name__ == "__main__":
    raise SystemExit(main(PIPELINE))
'''


class Toy:
    """A pipeline in a folder; its registry is SQLite, or a directory in its place, which cannot be opened."""

    def __init__(self, folder: Path, model: Path, give_back: str = "pass") -> None:
        self.folder, self.out, self.database = folder, folder / "run", folder / "store" / "mlflow.db"
        self.uri = f"sqlite:///{self.database}"
        (folder / "recipes").mkdir()
        source = TOY.replace("FOLDER", repr(str(model))).replace("GIVE_BACK", give_back)
        (folder / "toy.py").write_text(source)
        text = TINY.read_text().replace("name: tiny", "name: toy", 1)
        (folder / "recipes" / "toy.yaml").write_text(f"{text}tracking: {{enabled: false, uri: '{self.uri}'}}\n")
        self.database.mkdir(parents=True)

    def run(self) -> tuple[int, str]:
        command = [sys.executable, str(self.folder / "toy.py"), "--out", str(self.out)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.folder, timeout=250,
            env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        return done.returncode, done.stdout

    def statuses(self) -> dict[str, str]:
        steps = json.loads((self.out / "steps.json").read_text())["attempts"][-1]["steps"]
        return {name: step["status"] for name, step in steps.items()}


def test_the_run_continues_and_the_exit_code_names_what_is_pending(tmp_path: Path, folders: dict[str, Path]) -> None:
    toy = Toy(tmp_path, folders["stock"])
    code, said = toy.run()
    assert code == 4, said
    assert "register_teacher: pending, continuing without it: the model registry at sqlite:" in said
    assert "everything is done but register_teacher" in said and "run the same command again" in said
    assert "Traceback" not in said and not list((toy.out / "logs").glob("error-*"))
    assert toy.statuses() == {"made": "done", "scored": "done", "register_teacher": "pending", "last": "done"}
    assert (toy.out / "report.json").exists() and (toy.out / "last" / "manifest.json").exists()
    assert not (toy.out / "register_teacher" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("back", ["at the next run", "before the report"])
def test_what_waited_is_registered_once_when_the_registry_is_back(
    tmp_path: Path, folders: dict[str, Path], back: str
) -> None:
    remove = f"Path({str(tmp_path / 'store' / 'mlflow.db')!r}).rmdir()"
    toy = Toy(tmp_path, folders["stock"], remove if back == "before the report" else "pass")
    code, said = toy.run()
    if back == "at the next run":
        assert code == 4, said
        toy.database.rmdir()
        code, said = toy.run()
        assert "made: skipped" in said and "last: skipped" in said
    assert code == 0, said
    registration = json.loads((toy.out / "register_teacher" / "registration.json").read_text())
    assert not registration["promoted"] and "leak: near duplicates between" in registration["reason"]
    client = open_registry(toy.uri)
    assert len(list_versions(client, NAME)) == 1
    assert aliases(client, NAME) == {"candidate": "1"}
    assert toy.statuses()["register_teacher"] == "done"
    before = (toy.out / "register_teacher" / "manifest.json").stat().st_mtime_ns
    assert toy.run()[0] == 0 and (toy.out / "register_teacher" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_registry_that_is_gone_for_good_is_replaced_by_another(tmp_path: Path, folders: dict[str, Path]) -> None:
    toy, recipe = Toy(tmp_path, folders["stock"]), tmp_path / "recipes" / "toy.yaml"
    assert toy.run()[0] == 4
    text, second = recipe.read_text(), f"sqlite:///{tmp_path}/second.db"
    recipe.write_text(text.replace(toy.uri, second))
    code, said = toy.run()
    assert code == 0, said
    assert aliases(open_registry(second), NAME) == {"candidate": "1"}
    recipe.write_text(text.replace(toy.uri, f"sqlite:///{tmp_path}/third.db"))
    code, said = toy.run()
    assert code == 0 and "register_teacher: skipped, unchanged" in said
    assert f"register_teacher: stays registered in {second}, where it was done" in said
    assert not (tmp_path / "third.db").exists()
