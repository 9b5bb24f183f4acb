"""The command after `--`, the files uploaded with it, and those never uploaded."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.core.secrets import is_secret_name, mask
from nvembed.jobs.backend import FAILED, RUNNING, STOPPED, SUCCEEDED, JobState, choose, next_try, refuse_if_alive
from nvembed.jobs.command import Job, read_job
from nvembed.jobs.config import CloudTarget, KubeRayTarget, RayTarget, SlurmTarget
from nvembed.jobs.ray import backend
from nvembed.jobs.uploads import NEVER, collect
from nvembed.preflight.findings import PreflightError
from nvembed.types import UserError

LOCAL = RayTarget(address="http://127.0.0.1:8265")
REMOTE = RayTarget(address="https://ray.example.org", shared_paths=("/shared",))
KUBERAY = KubeRayTarget(
    type="kuberay",
    image="i",
    storage={"type": "claim", "claim": "c", "mount_path": "/shared"},  # type: ignore[arg-type]
)
SLURM = SlurmTarget(type="slurm", shared_dir="/s", working_dir="/w")
CLOUD = CloudTarget(
    type="cloud", cluster_name="c", image="i", bucket="s3://b", provider={"type": "aws", "region": "r"},  # type: ignore[arg-type]
    head={"machine": "m", "cpus": 2}, workers=[{"machine": "m", "cpus": 2}],  # type: ignore[arg-type]
)  # fmt: skip
COMMAND = ("python", "light.py")


def test_the_parts_of_a_command(checkout: Path) -> None:
    options = ["--set", "name=a", "--out=/o/", "recipes/light.yaml", "--set=mine.depth=9", "--no-auto-promote"]
    job = read_job(LOCAL, [*COMMAND, *options])
    assert job.recipe.name == "a" and job.recipe.mine.depth == 9 and job.out == "/o"
    assert job.argv == [
        "python", "light.py", "recipes/light.yaml", "--set", "name=a", "--set", "mine.depth=9", "--out", "/o",
        "--no-auto-promote",
    ]  # fmt: skip
    assert job.with_resolved_recipe("R", "S") == ["python", "S", "R", "--out", "/o", "--no-auto-promote"]
    assert read_job(LOCAL, ["light.py", "--out", "/o"]).argv == ["python", "light.py", "--out", "/o"]
    absolute = read_job(LOCAL, [*COMMAND, str(checkout / "recipes/light.yaml"), "--out", "/o"])
    assert absolute.recipe_path == "recipes/light.yaml", "the job's copy lies elsewhere"
    assert re.fullmatch(r"nvembed-a-[0-9a-f]{10}", job.base)
    about = job.metadata
    assert len(about["nvembed_recipe_sha256"]) == 64 and about["nvembed_out"] == "/o"
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert about["git_revision"] == head
    (checkout / "light.py").write_text((checkout / "light.py").read_text() + "\n")
    assert job.metadata["git_revision"] == f"{head}-dirty"


def test_the_same_run_has_the_same_fingerprint(checkout: Path) -> None:
    def fingerprint(*options: str) -> str:
        return read_job(LOCAL, [*COMMAND, "--out", "/o", *options]).fingerprint

    plain = fingerprint()
    assert plain == fingerprint("recipes/light.yaml") == fingerprint("--set", "name=light")
    others = [fingerprint("--set", "mine.depth=9"), fingerprint("--no-auto-promote")]
    others.append(read_job(LOCAL, [*COMMAND, "--out", "/p"]).fingerprint)
    assert len({plain, *others}) == 4


@settings(max_examples=40)
@given(st.text(st.sampled_from("aZ9_.-"), min_size=0, max_size=70), st.integers(1, 999))
def test_ids_are_names_that_kubernetes_takes(tail: str, number: int) -> None:
    unused: Any = None
    job = Job(f"A{tail}", "0123456789", "python", "s", (), "", (), unused, "/o", Path())
    base = job.base
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", f"{base}-{number}") and len(f"{base}-{number}") <= 47


BAD: list[tuple[Any, list[str], str]] = [
    (LOCAL, [], "no command"),
    (LOCAL, ["bash", "x.sh"], "a job is a pipeline file run by python"),
    (LOCAL, ["python", "-m", "x"], "no pipeline file after python"),
    (LOCAL, ["python", "no.py"], "no.py: no such file"),
    (LOCAL, ["python", "../x.py"], "outside the working directory"),
    (LOCAL, ["python", "/etc/x.py"], "outside the working directory"),
    (LOCAL, ["python", "plain.py"], "plain.py: declares no pipeline: it has no module-level `PIPELINE = Pipeline("),
    (LOCAL, ["python", "broken.py"], "not a Python file"),
    (LOCAL, [*COMMAND], "no --out: the job runs on other machines"),
    (LOCAL, [*COMMAND, "--out"], "--out needs a value"),
    (LOCAL, [*COMMAND, "--out", "runs/x"], "not on storage that every node sees"),
    (LOCAL, [*COMMAND, "a.yaml", "b.yaml", "--out", "/o"], "a second recipe after a.yaml"),
    (LOCAL, [*COMMAND, "--out", "/o", "--set", "mine.depht=3"], "Did you mean 'depth'?"),
    (LOCAL, [*COMMAND, "no.yaml", "--out", "/o"], "no such recipe"),
    (REMOTE, [*COMMAND, "--out", "/home/me/x"], "Give a URI, or a path below /shared"),
    (REMOTE, [*COMMAND, "--out", "/shared/../x"], "Give a URI, or a path below /shared"),
    (KUBERAY, [*COMMAND, "--out", "/tmp/x"], "a path below /shared"),
    (SLURM, [*COMMAND, "--out", "x"], "with / at its beginning"),
    (CLOUD, [*COMMAND, "--out", "s3://b/x"], "write below /mnt/nvembed"),
    (
        LOCAL,
        [*COMMAND, "--out", "/o", "--set", "tracking.uri=http://u:hunter2@h"],
        "a URL with a password or token in it",
    ),
]


@pytest.mark.parametrize(("target", "command", "message"), BAD, ids=range(len(BAD)))
def test_bad_commands_are_refused_before_anything_is_sent(
    checkout: Path, target: Any, command: list[str], message: str
) -> None:
    (checkout / "plain.py").write_text("print(1)\n")
    (checkout / "broken.py").write_text("def (\n")
    with pytest.raises(UserError) as raised:
        read_job(target, command)
    assert message in str(raised.value) and "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ("def f():\n    PIPELINE = Pipeline(light)", "declares no pipeline"),
        ("PIPELINE = light", "declares no pipeline"),
        ("PIPELINE = Pipeline(light)\nPIPELINE = Pipeline(light)", ":2: PIPELINE is declared on lines 1 and 2"),
        ("NAME = 'a.yaml'\nPIPELINE = Pipeline(light, recipe=NAME)", ":2: recipe=NAME is not a literal"),
        ("PIPELINE = Pipeline(light, needs=tuple(x))", ":1: needs=tuple(x) is not a literal"),
        ("PIPELINE = Pipeline(light, needs='stage_1')", ":1: Pipeline(...) takes a file name as recipe="),
        ("x = 1\n\nPIPELINE = Pipeline(light, recipe='no.yaml')", ":3: recipe='no.yaml': no such file, "),
        ("PIPELINE = Pipeline(light, 'light.yaml', ('teacher',))", "teacher: missing"),
        (
            "PIPELINE: Pipeline = declaration.Pipeline(light, recipe='light.yaml', needs=('teacher',))",
            "teacher: missing",
        ),
    ],
)
def test_a_declaration_is_read_from_the_source(checkout: Path, declaration: str, message: str) -> None:
    """Nothing of these files could be executed."""
    (checkout / "other.py").write_text(f"{declaration}\n")
    with pytest.raises(UserError) as raised:
        read_job(LOCAL, ["python", "other.py", "--out", "/o"])
    assert message in str(raised.value), raised.value


def test_a_recipe_on_the_command_line_needs_no_default(checkout: Path) -> None:
    (checkout / "other.py").write_text("PIPELINE = Pipeline(light, recipe='no.yaml')\n")
    assert read_job(LOCAL, ["python", "other.py", "recipes/light.yaml", "--out", "/o"]).name == "light"


def test_the_recipe_is_the_one_below_the_working_directory(checkout: Path, tmp_path: Path) -> None:
    """The pipeline runs there, so the file checked here must be the one it reads there."""
    other = tmp_path / "other"
    shutil.copytree(checkout, other)
    recipe = (checkout / "recipes/light.yaml").read_text()
    (other / "recipes/light.yaml").write_text(recipe.replace("name: light", "name: elsewhere"))
    there = LOCAL.model_copy(update={"working_dir": str(other)})
    command = ["python", "light.py", "recipes/light.yaml", "--out", "/o"]
    assert read_job(there, command).name == "elsewhere"
    assert read_job(LOCAL, command).name == "light"
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "commit", "-qam", "another"], cwd=other, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=other, capture_output=True, text=True, check=True)
    assert read_job(there, command).metadata["git_revision"] == head.stdout.strip(), "of the code that runs"
    assert read_job(LOCAL, command).metadata["git_revision"] != head.stdout.strip()
    assert read_job(KUBERAY, [*command[:-1], "/shared/o"]).metadata["git_revision"] == "none", "the image's code runs"


def test_outputs_on_shared_storage(checkout: Path) -> None:
    for target, out in [(REMOTE, "/shared/a"), (REMOTE, "s3://b/a"), (KUBERAY, "/shared/a"), (CLOUD, "/mnt/nvembed/a")]:
        assert read_job(target, [*COMMAND, "--out", out]).out == out
    with_outputs = REMOTE.model_copy(update={"outputs": "s3://bucket/runs"})
    assert read_job(with_outputs, [*COMMAND]).out == "s3://bucket/runs/light"


def test_a_secret_on_the_command_line_is_refused_unseen(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-77aa")
    with pytest.raises(UserError, match="the value of HF_TOKEN") as raised:
        read_job(LOCAL, [*COMMAND, "--out", "/o", "--set", "description=canary-77aa"])
    assert "canary" not in str(raised.value)
    hidden = REMOTE.model_copy(update={"outputs": "s3://bucket/canary-77aa"})
    with pytest.raises(UserError, match="output holds the value of HF_TOKEN"):
        read_job(hidden, [*COMMAND])


# -- what travels -----------------------------------------------------------------------------------------------------


def test_what_git_ignores_and_what_is_no_code_stays(checkout: Path) -> None:
    for name in (
        "ignored.txt", "runs/x/a.bin", ".env", "deploy.pem", "__pycache__/a.pyc", "untracked.py", "docs/a.md", ".venv/b"
    ):  # fmt: skip
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("x")
    travels = collect(checkout, ["docs/"], 1)
    assert set(travels.files) == {".gitignore", "light.py", "recipes/light.yaml", "untracked.py"}
    travels.stage(checkout / "runs/staged")
    copied = checkout / "runs/staged"
    assert (copied / "light.py").read_bytes() == (checkout / "light.py").read_bytes()
    assert sorted(path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()) == sorted(
        travels.files
    )


def test_outside_a_checkout_the_same_rules_hold(tmp_path: Path) -> None:
    for name in ("a.py", "b/c.py", "b/skip.log", "b/d/e.txt", "env/pyvenv.cfg", "env/lib/x.py", "node_modules/x.js"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "b/.gitignore").write_text("*.log\nd/\n")
    (tmp_path / ".rayignore").write_text("a.py\n")
    assert set(collect(tmp_path, [], 1).files) == {".rayignore", "b/.gitignore", "b/c.py"}


def test_too_large_names_the_biggest_and_links_out_are_refused(checkout: Path) -> None:
    (checkout / "big.bin").write_bytes(b"\0" * 2_000_000)
    with pytest.raises(UserError, match=r"2\.0 MB in 4 files, more than max_megabytes 1. The biggest:\n +2\.0 MB  big"):
        collect(checkout, [], 1)
    assert "big.bin" not in collect(checkout, ["*.bin"], 1).files
    (checkout / "link").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="a link that leads out"):
        collect(checkout, ["*.bin"], 1)


def test_a_file_with_a_secret_does_not_travel(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-2b2b")
    (checkout / "notes.txt").write_text("key = canary-2b2b")
    with pytest.raises(UserError, match=r"notes.txt: holds the value of AWS_SECRET_ACCESS_KEY") as raised:
        collect(checkout, [], 1)
    assert "canary" not in str(raised.value)


def test_a_recipe_that_is_not_uploaded_is_refused(checkout: Path) -> None:
    recipe = checkout / "ignored.txt"
    recipe.write_text((checkout / "recipes/light.yaml").read_text())
    job = read_job(LOCAL, [*COMMAND, "ignored.txt", "--out", "/o"])
    with pytest.raises(UserError, match=r"recipe ignored.txt: is not uploaded"):
        backend.RayBackend(LOCAL).preview(job)


def test_never_holds_what_names_secrets() -> None:
    assert {".env", "*.pem", "id_rsa*", "auth_token", ".netrc"} <= set(NEVER)


# -- secrets, tries, tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "secret"),
    [("HF_TOKEN", True), ("AWS_SECRET_ACCESS_KEY", True), ("PGPASSWORD", True), ("OPENAI_API_KEY", True),
     ("my_credentials", True), ("GOOGLE_APPLICATION_CREDENTIALS", True), ("RAY_AUTH_TOKEN_PATH", False),
     ("PATH", False), ("PWD", False), ("KEYBOARD", False), ("TOKENIZERS_PARALLELISM", False), ("MONKEY_X", False)],
)  # fmt: skip
def test_secret_names(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret


@settings(max_examples=25)
@given(st.text("aZ9/+.$\\", min_size=8, max_size=12), st.text(max_size=9), st.text(max_size=9))
def test_masked_texts_hold_no_secret(value: str, before: str, after: str) -> None:
    assert value not in mask(before + value + after, {"MY_TOKEN": value}).replace("****", "\0")


def test_passwords_in_urls_are_masked() -> None:
    assert mask("a postgresql://me:hunter2@h/d b", {}) == "a postgresql://me:****@h/d b"


def state(job_id: str, how: str, fingerprint: str = "f", out: str = "/o") -> JobState:
    return JobState(job_id, how, metadata={"nvembed_fingerprint": fingerprint, "nvembed_out": out})


@settings(max_examples=20)
@given(st.lists(st.integers(1, 30), unique=True))
def test_the_next_try_is_free(tries: list[int]) -> None:
    states = [state(f"nvembed-a-f-{number}", FAILED) for number in tries]
    job_id = next_try("nvembed-a-f", [*states, state("nvembed-b-f-99", FAILED), state("nvembed-a-f-x", FAILED)])
    assert job_id == f"nvembed-a-f-{max(tries, default=0) + 1}"


def test_a_live_run_of_the_same_output_is_refused(checkout: Path) -> None:
    job = read_job(LOCAL, [*COMMAND, "--out", "/o"])
    refuse_if_alive(job, [state("x-1", SUCCEEDED, job.fingerprint), state("x-2", RUNNING, "other", "/p")])
    with pytest.raises(UserError, match="this run is running as x-1"):
        refuse_if_alive(job, [state("x-1", RUNNING, job.fingerprint)])
    with pytest.raises(UserError, match="another run with the output /o is running as x-2"):
        refuse_if_alive(job, [state("x-2", RUNNING, "other")])


def test_choosing_a_job() -> None:
    states = [state("a-1", SUCCEEDED), state("a-2", RUNNING), state("a-3", STOPPED)]
    assert choose(states, None, alive=False).id == "a-3" and choose(states, None, alive=True).id == "a-2"
    assert choose(states, "a-1", alive=False).id == "a-1"
    for wrong, message in [([], "no job of nvembed"), ([*states, state("a-4", RUNNING)], "which job")]:
        with pytest.raises(UserError, match=message):
            choose(wrong, None, alive=True)
    with pytest.raises(UserError, match="b-1: no such job"):
        choose(states, "b-1", alive=False)


@pytest.mark.parametrize(
    ("how", "code", "expected"),
    [(SUCCEEDED, 0, 0), (FAILED, 2, 2), (FAILED, 137, 137), (FAILED, -9, 137), (FAILED, None, 4), (FAILED, 0, 4),
     (STOPPED, None, 130)],
)  # fmt: skip
def test_exit_codes(how: str, code: int | None, expected: int) -> None:
    assert backend.exit_code(JobState("a", how, exit_code=code)) == expected


def test_where_the_token_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "named").write_text(" from-path\n")
    assert backend.read_token({"RAY_AUTH_TOKEN": "direct", "RAY_AUTH_TOKEN_PATH": "/no"}) == "direct"
    assert backend.read_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}) == "from-path"
    with pytest.raises(PreflightError, match="RAY_AUTH_TOKEN_PATH: /no/such cannot be read"):
        backend.read_token({"RAY_AUTH_TOKEN_PATH": "/no/such"})
    with pytest.raises(PreflightError, match="no token for the cluster"):
        backend.read_token({})
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("of-ray")
    assert backend.read_token({}) == "of-ray"


def test_the_driver_looks_for_its_secrets_first(checkout: Path) -> None:
    target = LOCAL.model_copy(update={"secrets": ("NV_A", "NV_B")})
    job = read_job(target, ["python", "light.py", "--out", "/o with space"])
    entry = backend.render_entrypoint(target, job)
    assert entry.endswith("exec python light.py --out '/o with space'")
    probe = entry.rpartition("exec ")[0] + "echo all there"
    for environment, code, message in [
        ({"NV_A": "x", "NV_B": "y"}, 0, "all there"), ({"NV_A": "x"}, 3, "error: NV_B is not set")
    ]:  # fmt: skip
        done = subprocess.run(["sh", "-c", probe], env=environment, capture_output=True, text=True)
        assert done.returncode == code and message in done.stdout
