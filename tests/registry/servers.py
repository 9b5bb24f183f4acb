"""A real `mlflow server` with basic authentication on a real PostgreSQL, for tests: started, killed, started again."""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [
    Path(binary).parent for binary in [shutil.which("initdb")] if binary
]
DATABASE_USER = "mlflow"


def why_not() -> str:
    """Why such a server cannot run here; empty when it can."""
    if not BINARIES:
        return "no PostgreSQL server programs on this machine (initdb)"
    missing = [name for name in ("psycopg2", "flask_wtf") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (pip install 'nvembed[test]')"
    if os.getuid() == 0 and _unprivileged() is None:
        return "PostgreSQL refuses to run as root and there is no other user"
    return ""


def _unprivileged() -> str | None:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    return None


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Postgres:
    """One PostgreSQL server in a folder, on loopback."""

    folder: Path
    port: int = field(default_factory=free_port)

    @property
    def uri(self) -> str:
        """SQLAlchemy URI of the database `mlflow` (a bare `postgresql://` asks for psycopg 3 since SQLAlchemy 2.1)."""
        return f"postgresql+psycopg2://{DATABASE_USER}@127.0.0.1:{self.port}/mlflow"

    def start(self) -> None:
        """Make a cluster of databases, and one database; run the server."""
        user = _unprivileged() if os.getuid() == 0 else None
        self.folder.mkdir(parents=True)
        for parent in [self.folder, *self.folder.parents]:
            if parent.stat().st_uid == os.getuid() and parent.is_relative_to("/tmp") and parent != Path("/tmp"):
                parent.chmod(parent.stat().st_mode | 0o711)
        if user is not None:
            shutil.chown(self.folder, user)
        data, log = str(self.folder / "data"), self.folder / "log"
        self._as(user, "initdb", "-D", data, "-U", DATABASE_USER, "--auth=trust", "--no-sync")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off"
        self._as(user, "pg_ctl", "-D", data, "-w", "-l", str(log), "-o", options, "start")
        self._as(user, "createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", DATABASE_USER, "mlflow")

    def stop(self) -> None:
        """End it."""
        user = _unprivileged() if os.getuid() == 0 else None
        self._as(user, "pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def _as(self, user: str | None, program: str, *arguments: str) -> None:
        command = [str(BINARIES[-1] / program), *arguments]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        done = subprocess.run(
            command, user=user, env=environment, cwd=self.folder, timeout=120, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout


@dataclass
class MlflowServer:
    """`mlflow server` on loopback; the same store and artifacts whenever it is started again."""

    folder: Path
    store: str
    auth: bool = True
    port: int = field(default_factory=free_port)
    password: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Tracking and registry URI; it carries no password."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def login(self) -> dict[str, str]:
        """Environment of a client."""
        return {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": self.password} if self.auth else {}

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", self.store, "--serve-artifacts",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        if self.auth:
            settings = self.folder / "auth.ini"
            settings.write_text(
                "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
                f"database_uri = sqlite:///{self.folder}/auth.db\n"
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            )
            command += ["--app-name", "basic-auth"]
            environment |= {
                "MLFLOW_AUTH_CONFIG_PATH": str(settings),
                "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
                "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
            }
        log = open(self.folder / "server.log", "ab")  # noqa: SIM115 (the child keeps it)
        self.process = subprocess.Popen(
            command, env=environment, cwd=self.folder, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
        )
        log.close()
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log()
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise AssertionError(f"it does not answer: {self.log()}")

    def log(self) -> str:
        """The end of what it printed."""
        return (self.folder / "server.log").read_text(errors="replace")[-3000:]

    def kill(self) -> None:
        """kill -9 of the server and its workers."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=30)
