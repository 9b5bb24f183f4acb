"""`run_pipeline` and the declaration of a pipeline: what a Python caller gets, and what importing a file costs."""

import doctest
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from nvembed.core.steps import Step
from nvembed.pipeline import execution, steps
from nvembed.pipeline.declaration import Pipeline, load_pipeline
from nvembed.pipeline.dry_run import DryRun
from nvembed.pipeline.execution import ray_until_end, run_pipeline
from nvembed.pipeline.run import PipelineRun
from nvembed.pipeline.signals import Interrupts
from nvembed.pipeline.step_runner import StepFailedError
from nvembed.pipeline.steps import StepReference, load_step
from nvembed.types import UserError

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "pipelines/recipes/tiny.yaml"
FILES = sorted((ROOT / "pipelines").glob("*.py"))
HEAVY = ("torch", "ray", "transformers", "mlflow", "deepspeed", "datasets", "pydantic", "numpy")

SMALL = '''
"""A pipeline of one step."""
from nvembed.core import storage
from nvembed.core.steps import Step, StepResult
from nvembed.pipeline.declaration import Pipeline

def build(config, inputs, uri):
    BODY
    storage.write_json(storage.join(uri, "result.json"), 1)
    return StepResult()

def small(run):
    """One step."""
    run.step("first", Step("prepare", 1, build), run.recipe.prepare)
    run.report()

PIPELINE = Pipeline(small, recipe="small.yaml")
'''


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a pipeline of one step; the working directory is its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    text = TINY.read_text().replace("name: tiny", "name: small", 1)
    (tmp_path / "recipes/small.yaml").write_text(text + "tracking: {enabled: false}\n")
    (tmp_path / "small.py").write_text(SMALL.replace("BODY", "pass"))
    return tmp_path / "small.py"


def test_a_run_returns_its_artifacts_and_report(small: Path, tmp_path: Path) -> None:
    run = run_pipeline(str(small), settings=["description=from Python"], quiet=True)
    assert isinstance(run, PipelineRun) and run.recipe.description == "from Python"
    assert run.out == f"{tmp_path}/runs/small" and list(run.artifacts) == ["first"]
    assert (tmp_path / "runs/small/first/result.json").exists() and run.report_path == f"{run.out}/report.html"
    again = run_pipeline(load_pipeline(str(small)), settings=["description=from Python"], out=run.out, quiet=True)
    assert again.artifacts["first"].manifest == run.artifacts["first"].manifest
    plan = run_pipeline(str(small), settings=["description=from Python"], dry_run=True)
    assert isinstance(plan, DryRun) and [(step.name, step.what) for step in plan.steps] == [
        ("first", "skip"), ("report", "run")
    ]  # fmt: skip
    with pytest.raises(UserError, match='description: "from Python" -> "another"'):
        run_pipeline(str(small), settings=["description=another"])


def test_errors_are_raised(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'depth'"):
        run_pipeline(str(small), settings=["mine.depht=3"])
    with pytest.raises(UserError, match=r"no.yaml: no such recipe"):
        run_pipeline(str(small), "no.yaml")
    small.write_text(SMALL.replace("BODY", "raise RuntimeError('broken')"))
    with pytest.raises(StepFailedError, match="step first failed: RuntimeError: broken"):
        run_pipeline(str(small), quiet=True)
    with pytest.raises(UserError, match=r"none\.py: no such pipeline file"):
        run_pipeline(str(tmp_path / "none.py"))
    (tmp_path / "other.py").write_text("PIPELINE = 3\n")
    with pytest.raises(UserError, match=r"other\.py: no pipeline: it has no module-level `PIPELINE = Pipeline"):
        run_pipeline(str(tmp_path / "other.py"))


def test_ctrl_c_in_a_python_caller_raises_and_leaves_its_process_alone(small: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    small.write_text(
        SMALL.replace("BODY", "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    )
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(str(small), quiet=True)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("interrupts")]
    small.write_text(SMALL.replace("BODY", "pass"))
    assert run_pipeline(str(small), quiet=True).artifacts


def test_a_run_in_another_thread_has_no_handlers(small: Path) -> None:
    runs: list[Any] = []
    thread = threading.Thread(target=lambda: runs.append(run_pipeline(str(small), quiet=True)))
    thread.start()
    thread.join()
    assert list(runs[0].artifacts) == ["first"]


def test_without_a_grace_time_every_ctrl_c_raises() -> None:
    output: list[str] = []
    with Interrupts(output.append, lambda: None, grace=None) as interrupts:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                signal.sigtimedwait([], 1)
        assert interrupts.requested


def test_a_callers_own_processes_and_cluster_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ray:
        running, shut_down = True, 0

        def is_initialized(self) -> bool:
            return self.running

        def shutdown(self) -> None:
            self.running, self.shut_down = False, self.shut_down + 1

    def sleeper() -> psutil.Process:
        return psutil.Process(subprocess.Popen(["sleep", "60"]).pid)

    monkeypatch.setattr(execution, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setitem(sys.modules, "ray", ray := Ray())
    own = sleeper()
    try:
        with ray_until_end():
            meanwhile = sleeper()
        assert ray.shut_down == 0 and own.is_running() and meanwhile.is_running(), (
            "the caller's cluster and its children"
        )
        meanwhile.kill()
        meanwhile.wait()
        ray.running = False
        with ray_until_end():
            ray.running = True
            started = sleeper()
        assert ray.shut_down == 1 and own.status() == psutil.STATUS_SLEEPING
        assert started.wait(timeout=10) is not None, "what the run's cluster left is ended"
    finally:
        own.kill()
        own.wait()


def test_the_example_of_run_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    [example] = doctest.DocTestFinder().find(run_pipeline, "run_pipeline", globs={})
    result = doctest.DocTestRunner().run(example)
    assert (result.failed, result.attempted) == (0, 3)


# -- pipeline files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_pipeline_file_is_short_and_loads_nothing_heavy(path: Path) -> None:
    assert path.read_text().count("\n") < 80
    script = f"""
import runpy, sys
names = runpy.run_path({str(path)!r}, run_name="imported")
assert names["PIPELINE"].function.__name__ == {path.stem!r}
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_every_reference_is_a_step_of_its_own_kind() -> None:
    references = {name: value for name, value in vars(steps).items() if isinstance(value, StepReference)}
    loaded = {name: load_step(reference) for name, reference in references.items()}
    assert {"PREPARE", "MINE", "TRAIN", "REGISTER", "IMPORT_MODEL"} <= set(loaded)
    assert all(isinstance(step, Step) and step.kind == name.lower() for name, step in loaded.items())
    assert load_step(loaded["MINE"]) is loaded["MINE"]


def test_the_default_recipe_lies_beside_the_function() -> None:
    for path in FILES:
        pipeline = load_pipeline(str(path))
        assert Path(pipeline.recipe_path).parent == ROOT / "pipelines/recipes" and Path(pipeline.recipe_path).is_file()
    assert Pipeline(print).needs == ()


def test_the_teacher_alone_takes_the_quickstarts_recipe() -> None:
    teacher, both = (
        run_pipeline(str(ROOT / "pipelines" / name), out="/no/such/output", dry_run=True)
        for name in ("nv_embed.py", "quickstart.py")
    )
    assert teacher.recipe == both.recipe and teacher.recipe.student is not None
    names = [step.name for step in teacher.steps[:-1]]
    assert names == [step.name for step in both.steps][: len(names)] and names[-1] == "register_teacher"
