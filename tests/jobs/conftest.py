"""A light pipeline with a recipe, in a checkout of its own, and a real Ray head with token authentication."""

import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PIPELINE_FILE = '''
"""A light pipeline: what a job sees of its cluster, then as its recipe is named."""

import os
import time

from nvembed.core import storage
from nvembed.pipeline.command_line import main
from nvembed.pipeline.declaration import Pipeline
from nvembed.pipeline.run import PipelineRun
from nvembed.types import UserError


def look_for_the_token() -> tuple[str, int]:
    """Mode of the token's file, and how many command lines hold the token."""
    import psutil

    path = os.environ["RAY_AUTH_TOKEN_PATH"]
    token = open(path).read().strip()
    assert len(token) == 64
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return oct(os.stat(path).st_mode & 0o777), sum(token in line for line in lines)


def light(run: PipelineRun) -> None:
    """Look at the cluster."""
    if not isinstance(run, PipelineRun):  # a dry run
        return

    import ray

    from nvembed.core.ray_cluster import ensure_ray

    marks = f"{run.out}/attempts"
    attempts = int(storage.read_bytes(marks)) + 1 if storage.exists(marks) else 1
    storage.write_bytes(marks, str(attempts).encode())
    print("attempt", attempts, "of", run.recipe.name, flush=True)
    ensure_ray()
    run.runner.interrupts.arm()  # as a run does before its first step on Ray, whose handler for SIGTERM ends in abort()

    @ray.remote
    def where() -> tuple[str, str]:
        return ray.get_runtime_context().get_node_id(), os.environ.get("PLAIN", "")

    node, plain = ray.get(where.remote())
    print("RAY_ADDRESS", os.environ["RAY_ADDRESS"], "cpus", ray.cluster_resources().get("CPU"), "plain", plain)
    print("same node", node == ray.get_runtime_context().get_node_id(), flush=True)
    if run.recipe.name == "looks":
        print("token", *look_for_the_token(), flush=True)
    for number in range(20 if run.recipe.name == "counts" else 0):
        print("count", number, flush=True)
        time.sleep(1)
    if run.recipe.name == "wrong":
        raise UserError("this pipeline is meant to fail")
    while run.recipe.name == "waits":
        run.runner.interrupts.check()
        time.sleep(0.2)


PIPELINE = Pipeline(light, recipe="light.yaml")

if __name__ == "__main__":
    raise SystemExit(main(PIPELINE))
'''


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with the light pipeline and its recipe; the working directory."""
    folder = tmp_path / "checkout"
    (folder / "recipes").mkdir(parents=True)
    (folder / "light.py").write_text(PIPELINE_FILE.lstrip())
    tiny = (ROOT / "pipelines/recipes/tiny.yaml").read_text()
    (folder / "recipes/light.yaml").write_text(tiny.replace("name: tiny", "name: light\ntracking: {enabled: false}", 1))
    (folder / ".gitignore").write_text("ignored.txt\nruns/\n")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    return folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Head:
    """A running Ray head."""

    address: str
    token: str
    log: Path
    temporary: Path


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head --block` on free ports of loopback, with its own temp dir, token and dashboard."""
    with running_head(tmp_path_factory.mktemp("head")) as found:
        yield found


@pytest.fixture
def start_head() -> Callable[..., AbstractContextManager[Head]]:
    """For a head that is started otherwise: see `running_head`."""
    return running_head


@contextmanager
def running_head(folder: Path, wrap: Callable[[str], str] = str) -> Iterator[Head]:
    """A head of its own, `wrap` around the shell command that starts it; nothing of it is left."""
    temporary = Path("/tmp") / f"nvr-{secrets.token_hex(3)}"  # sockets: the path must be short
    token, dashboard = secrets.token_hex(16), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={free_port()}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}",
        f"--temp-dir={temporary}", "--num-cpus=3", f"--object-store-memory={100 * 2**20}", "--disable-usage-stats",
    ]  # fmt: skip
    log = folder / "head.log"
    line = ["bash", "-c", f"exec {wrap(shlex.join(command))}"]
    with log.open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _await_dashboard(address, token, process, log)
        yield Head(address, token, log, temporary)
    finally:
        below = _tree(process.pid)
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(below, timeout=15)
        for left in [*alive, *_of(temporary)]:
            left.kill()
        subprocess.run(["rm", "-rf", str(temporary)], check=False)


def _tree(pid: int) -> list[psutil.Process]:
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _of(temporary: Path) -> list[psutil.Process]:
    """Processes of our own cluster without a parent: its temp dir is in their command lines."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(temporary) in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def _await_dashboard(address: str, token: str, process: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                assert json.load(answer) == []
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text())
