"""A Ray cluster of several simulated nodes in a process of its own, controlled line by line.

    python cluster_kit.py CPUS [CPUS ...]      one worker node per number; the head has no CPUs, as on a real cluster

Ray adds nodes from the main thread only, and a driver must not share the process with a cluster it is to lose nodes
of. Token authentication is on: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN come with the environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
STORE = 160 * 2**20


class SimulatedCluster:
    """Handle of the process: `address`, `environment` for drivers, nodes by number."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, environment: Mapping[str, str]) -> None:
        self._process = process
        self.folder = folder
        first = self._answer()
        self.address: str = first["address"]
        self.dashboard: str = first["dashboard"]
        self.environment = {**environment, "RAY_ADDRESS": self.address}

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the cluster has ended: {(self.folder / 'kit.log').read_text()[-3000:]}")

    def ask(self, what: str, **more: Any) -> Any:
        """Send one order and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def node_of(self, title: str) -> int | None:
        """Number of a worker node that has a process whose title starts with `title` ("ray::RayTrainWorker")."""
        found: int | None = self.ask("find", title=title)["node"]
        return found

    def remove(self, node: int) -> None:
        """Take a node away as a failing machine goes: everything on it is killed at once."""
        self.ask("remove", node=node)

    def add(self, cpus: float) -> int:
        """A new node; its number."""
        return int(self.ask("add", cpus=cpus)["node"])

    def alive(self) -> bool:
        """Whether every process of the nodes that were not removed still runs."""
        return bool(self.ask("alive")["alive"])

    def close(self) -> None:
        """End the cluster, whatever state it is in."""
        below = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        with contextlib.suppress(OSError, ValueError):
            self.ask("stop")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)
        for process in (*below, *([self._process] if self._process.poll() is None else [])):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def simulated_cluster(cpus: Sequence[float], **variables: str) -> Iterator[SimulatedCluster]:
    """A head without CPUs and one worker node per number, for the time of the block."""
    folder = Path(tempfile.mkdtemp(prefix="nv", dir="/tmp"))  # short: sockets lie below, and their paths are limited
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, cpus)]
    with open(folder / "kit.log", "w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=folder,
            start_new_session=True,
        )  # fmt: skip
    cluster = None
    try:
        cluster = SimulatedCluster(process, folder, environment)
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()
        else:
            process.kill()


# -- inside the process -------------------------------------------------------------------------------------------


def serve(cpus: Sequence[float]) -> None:
    """Start the nodes, then do what is asked until the input ends."""
    from ray.cluster_utils import Cluster

    def answer(**what: Any) -> None:
        print(json.dumps(what), flush=True)

    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": STORE})
    nodes = dict(enumerate(cluster.add_node(num_cpus=count, object_store_memory=STORE) for count in cpus))
    answer(address=cluster.address, dashboard=cluster.head_node.webui_url)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "stop":
            break
        if order["do"] == "find":
            answer(node=next((number for number, node in nodes.items() if runs(node, order["title"])), None))
        elif order["do"] == "remove":
            cluster.remove_node(nodes.pop(order["node"]), allow_graceful=False)
            answer(removed=order["node"])
        elif order["do"] == "add":
            number = max(nodes, default=len(cpus) - 1) + 1
            nodes[number] = cluster.add_node(num_cpus=order["cpus"], object_store_memory=STORE)
            answer(node=number)
        elif order["do"] == "alive":
            answer(alive=bool(cluster.remaining_processes_alive()))
    cluster.shutdown()
    answer(stopped=True)


def runs(node: Any, title: str) -> bool:
    """Whether a node has a process with this title."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in raylet.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(title):
                return True
    return False


if __name__ == "__main__":
    serve([float(count) for count in sys.argv[1:]])
