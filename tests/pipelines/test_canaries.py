"""Secrets planted in the environment of a whole run are in nothing it leaves behind, writes, or starts.

The tiny recipe, shortened, with a real MLflow server whose address carries a password. About 2 minutes on 2 idle cores.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "pipelines/recipes/tiny.yaml")
SHORT = ("stage_1.stream.steps=2", "stage_2=null", "student.stream.steps=2", "register.auto_promote=false")
CANARIES = {
    "HF_TOKEN": "hf_CanaryHfTokenQ1W2E3",
    "AWS_ACCESS_KEY_ID": "AKIACANARYCANARY1234",
    "AWS_SECRET_ACCESS_KEY": "CanaryAwsSecretR4T5Y6",
    "MLFLOW_TRACKING_PASSWORD": "CanaryMlflowPasswordU7I8",
    "OPENAI_API_KEY": "sk-CanaryOpenAiO9P0A1",
    "GITHUB_TOKEN": "ghp_CanaryGithubS2D3F4",
    "RAY_AUTH_TOKEN": "0123456789abcdefcanarycanary0123456789abcdef0123456789abcdef0123",
}
IN_URL = "CanaryPasswordInUrlG5H6"

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """A real MLflow server; its port and folder."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
                time.sleep(0.5)
        yield port, folder
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            child.kill()


@pytest.fixture(scope="module")
def session() -> Iterator[Path]:
    """Where Ray keeps its session; short, as sockets lie below."""
    folder = Path(tempfile.mkdtemp(prefix="nv", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def environment(session: Path, tracking: str) -> dict[str, str]:
    variables = {**os.environ, **CANARIES, "RAY_TMPDIR": str(session), "RAY_AUTH_MODE": "token"}
    variables["MLFLOW_TRACKING_URI"] = tracking
    variables.pop("RAY_ADDRESS", None)
    return variables


def leaks(folder: Path) -> list[str]:
    """Files below a folder that hold a canary, each with the one it holds."""
    faults = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            faults += [f"{path}: {name}" for name, value in planted().items() if value.encode() in data]
    return faults


def planted() -> Mapping[str, str]:
    return {**CANARIES, "a password in a URL": IN_URL}


def canaries_in(text: str) -> list[str]:
    return [name for name, value in planted().items() if value in text]


@pytest.mark.timeout(1500)
def test_a_whole_run_leaks_no_canary(server: tuple[int, Path], session: Path, tmp_path: Path) -> None:
    port, folder = server
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "pipelines/quickstart.py"), TINY, "--out", str(out)]
    command += [part for setting in SHORT for part in ("--set", setting)]
    variables = environment(session, f"http://somebody:{IN_URL}@127.0.0.1:{port}")
    with open(tmp_path / "output.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=tmp_path)
    arguments: set[str] = set()
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                arguments.add(" ".join(child.cmdline()))
            except psutil.NoSuchProcess:
                continue
        time.sleep(1)
    output = (tmp_path / "output.log").read_text()
    assert process.returncode == 0, output[-4000:]
    assert any("raylet" in line for line in arguments) and canaries_in("\n".join(arguments)) == []
    assert canaries_in(output) == []
    assert (out / "report.html").exists() and (out / "tracking.json").exists() and list(out.glob("logs/*.log"))
    assert leaks(out) == []
    logs = list(session.rglob("*.log"))
    assert logs, "Ray's session is in the folder that was set"
    assert leaks(session) == []
    assert (folder / "server.db").stat().st_size > 10_000 and b"nvembed.output" in (folder / "server.db").read_bytes()
    assert leaks(folder) == []


@pytest.mark.timeout(300)
def test_a_registry_that_is_away_is_named_without_its_password(session: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a text\n")
    variables = environment(session, f"http://somebody:{IN_URL}@127.0.0.1:{free_port()}")
    command = [
        sys.executable, "-m", "nvembed.cli", "embed", "models:/nvembed-teacher@champion", "texts.txt",
        "--out", "vectors.parquet",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=tmp_path, timeout=250)
    assert done.returncode == 2 and "127.0.0.1" in done.stderr, done.stderr
    assert canaries_in(done.stdout + done.stderr) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "arguments",
    [
        ("--set", f"tracking.uri=https://somebody:{IN_URL}@mlflow.example"),
        ("--out", f"s3://somebody:{IN_URL}@bucket/run"),
        ("--set", f"description={CANARIES['OPENAI_API_KEY']}"),
    ],
    ids=["recipe", "output", "value"],
)
def test_a_secret_given_where_things_are_stored_is_refused(
    session: Path, tmp_path: Path, arguments: tuple[str, str]
) -> None:
    command = [sys.executable, str(ROOT / "pipelines/quickstart.py"), TINY, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(session, ""), cwd=tmp_path, timeout=250
    )
    assert done.returncode == 2 and canaries_in(done.stdout + done.stderr) == [], done.stderr
    assert "environment" in done.stderr and list(tmp_path.iterdir()) == []
