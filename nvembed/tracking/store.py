"""MLflow's store of a run, names and values in the form that MLflow takes, and the tail of `metrics.jsonl`.

Does not import mlflow; `tracking/tracker.py` and `registry/` do.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sqlite3
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed.core import storage
from nvembed.core.secrets import without_credentials
from nvembed.core.steps import MLFLOW_ARTIFACTS, MLFLOW_DB
from nvembed.core.uris import SQLITE, file_uri, sqlite_path, sqlite_uri
from nvembed.types import Config, UserError

logger = logging.getLogger(__name__)

_BATCH_METRICS = 1000  # MLflow's own limit of one log_batch call
PROBE_SECONDS = 3.0  # a server that does not answer within this is unreachable
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


@dataclass(frozen=True)
class Store:
    """The store of MLflow.

    Attributes:
        configured: the URI of the recipe or the environment, as it may be stored: without user and password;
            None for the output's own store.
        uri: the tracking and registry URI.
        artifact_root: where a new experiment keeps its artifacts; None leaves it to the server.
    """

    configured: str | None
    uri: str
    artifact_root: str | None


def resolve_store(uri: str | None, out: str) -> Store:
    """The MLflow store of a run.

    Args:
        uri: the recipe's `tracking.uri`; null falls back to MLFLOW_TRACKING_URI, then to the output.
        out: output root.

    Raises:
        UserError: `out` is not local and no tracking URI is given.
    """
    configured = uri or os.environ.get("MLFLOW_TRACKING_URI") or None
    if configured is None:
        if not storage.is_local(out):
            raise UserError(
                f"tracking.uri: MLflow's SQLite store needs a local output, this one is {out}. "
                "Set tracking.uri (or MLFLOW_TRACKING_URI) to a server, or tracking.enabled=false."
            )
        database = _own_database(out)
    elif configured.startswith(SQLITE):
        database = sqlite_path(configured)
        if storage.is_local(out) and database == _own_database(
            out
        ):  # set for another command of the same shell; the run is the same with and without
            configured = None
    else:
        return Store(without_credentials(configured), configured, None)
    return Store(configured, sqlite_uri(database), file_uri(database.parent / MLFLOW_ARTIFACTS))


def _own_database(out: str) -> Path:
    return storage.local_path(out).absolute() / MLFLOW_DB


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """Parameters of a nested configuration: `{"a.b.0": "x"}`; lists of plain values stay one value (JSON)."""
    if isinstance(value, Config):
        value = value.model_dump(mode="json")
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        items = list(enumerate(value))
    if not items:
        return {valid_name(path): value if isinstance(value, str) else json.dumps(value)} if path else {}
    flat: dict[str, str] = {}
    for key, item in items:
        flat.update(flatten(item, f"{path}.{key}" if path else str(key)))
    return flat


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """The numeric leaves of a nested value, keyed by path with `/`; texts, flags and nulls are left out."""
    if isinstance(value, Mapping):
        leaves: dict[str, float] = {}
        for key, item in value.items():
            leaves.update(numbers(item, f"{path}/{key}" if path else str(key)))
        return leaves
    if isinstance(value, (int, float)) and not isinstance(value, bool) and path:
        return {valid_name(path): float(value)}
    return {}


def valid_name(path: str) -> str:
    """A parameter or metric name MLflow accepts."""
    return re.sub(r"[^\w\-. :/]", "_", path)[:250]


def probe(uri: str) -> None:
    """Raise OSError or sqlite3.Error at once where MLflow's own client would retry for minutes."""
    parsed = urllib.parse.urlsplit(uri)
    scheme = parsed.scheme.split("+")[0]
    if scheme == "sqlite":
        path = sqlite_path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=PROBE_SECONDS)
        try:
            connection.execute("PRAGMA schema_version").fetchone()
        finally:
            connection.close()
    elif scheme in ("http", "https"):
        try:
            health = without_credentials(uri).rstrip("/") + "/health"  # urllib takes user:password for the host's name
            urllib.request.urlopen(health, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code >= 500:
                raise
        except urllib.error.URLError as error:
            # a server answers; which certificates to trust is decided by MLflow's client, which has its own settings
            if not isinstance(error.reason, ssl.SSLCertVerificationError):
                raise
    elif scheme in _PORTS and parsed.hostname:
        socket.create_connection((parsed.hostname, parsed.port or _PORTS[scheme]), PROBE_SECONDS).close()


def prepare_environment() -> None:
    """Defaults for MLflow before it is imported: no telemetry, few retries, nothing printed between our own lines."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(name).setLevel(logging.WARNING)


class Follower:
    """Reads the complete rows added to a growing `metrics.jsonl` since the last `commit`.

    A row that is still being written (no newline) waits. A file that was cut back on resume is read again from the
    start, so a caller must know which optimiser steps it has.
    """

    def __init__(self) -> None:
        self._offset, self._last = 0, b""
        self._next = (0, b"")

    def read(self, uri: str) -> list[dict[str, Any]]:
        """The rows after the last commit; each has an integer `step`. Lines that are no such row are logged."""
        if not storage.exists(uri):
            return []
        fs, path = storage.filesystem(uri)
        fs.invalidate_cache()
        with fs.open(path, "rb") as file:
            begin = self._offset - len(self._last)
            file.seek(begin)
            if file.read(len(self._last)) == self._last:
                begin = self._offset
            else:  # cut back and written again
                begin = 0
                file.seek(0)
            data = file.read()
        end = data.rfind(b"\n") + 1
        lines = data[:end].splitlines(keepends=True)
        self._next = (begin + end, lines[-1] if lines else (self._last if begin else b""))
        return [row for row in map(_parse, lines) if row is not None]

    def commit(self) -> None:
        """Mark the rows of the last `read` as processed."""
        self._offset, self._last = self._next


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        int(row["step"])
    except (ValueError, TypeError, KeyError):
        logger.warning("a line of metrics.jsonl is not a JSON object with a step and is not sent: %r", line[:80])
        return None
    return dict(row)


class Tail:
    """Sends rows of a growing `metrics.jsonl`, each (metric, optimiser step) once.

    MLflow's rows are read once per process and again after every failure, so it does not matter whether a lost call had
    arrived. Of a step that was repeated after a resume, MLflow keeps the first values.
    """

    def __init__(self) -> None:
        self._rows = Follower()
        self._known: dict[str, set[int]] | None = None
        self._started = 0

    def send(self, client: Any, run_id: str, uri: str, metric_type: Any) -> None:
        """Send what is new as `metric_type` (mlflow.entities.Metric); rows count as read only after success."""
        rows = {row["step"]: row for row in self._rows.read(uri)}.values()
        if rows:
            known = self._known if self._known is not None else self._ask(client, run_id)
            self._known = None  # until the calls below have succeeded
            waiting = [metric for row in rows for metric in self._metrics(row, known, metric_type)]
            log_metrics(client, run_id, waiting)
            for metric in waiting:
                known.setdefault(metric.key, set()).add(metric.step)
            self._known = known
        self._rows.commit()

    def _ask(self, client: Any, run_id: str) -> dict[str, set[int]]:
        run = client.get_run(run_id)
        self._started = run.info.start_time
        return {key: {m.step for m in client.get_metric_history(run_id, key)} for key in run.data.metrics}

    def _metrics(self, row: Mapping[str, Any], known: Mapping[str, set[int]], make: Any) -> list[Any]:
        step = int(row["step"])
        # repeated calls must carry the same timestamp, or MLflow would keep both
        when = int(float(row["time"]) * 1000) if "time" in row else self._started + step
        values = numbers({key: value for key, value in row.items() if key not in ("step", "time")})
        return [make(key, value, when, step) for key, value in values.items() if step not in known.get(key, ())]


def log_metrics(client: Any, run_id: str, metrics: list[Any]) -> None:
    """Log metrics in calls of the size MLflow takes."""
    for begin in range(0, len(metrics), _BATCH_METRICS):
        client.log_batch(run_id, metrics=metrics[begin : begin + _BATCH_METRICS])
