"""Registry and tracking against `mlflow server` with authentication on PostgreSQL, killed and restarted in between."""

import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import MlflowServer, Postgres, why_not
from test_champion import race

from nvembed.core import storage
from nvembed.registry.champion import roll_back
from nvembed.registry.client import RegistryAwayError, aliases, list_versions, model_names, open_registry
from nvembed.registry.config import GateConfig, RegisterConfig
from nvembed.registry.describe import export_version
from nvembed.registry.resolve import resolve_model
from nvembed.registry.step import registration_config
from nvembed.tracking import tracker
from nvembed.tracking.config import TrackingConfig
from nvembed.tracking.store import Store
from nvembed.tracking.tracker import Tracker
from nvembed.types import Config

NAME = "nvembed-teacher"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.skipif(bool(why_not()), reason=why_not())]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    root = tmp_path_factory.mktemp("server")
    # Outside pytest's directory, which every other pytest that starts closes again for the server's user.
    with tempfile.TemporaryDirectory(prefix="nvembed-postgres-") as place:
        database = Postgres(Path(place) / "server")
        database.start()
        made = MlflowServer(root / "mlflow", database.uri)
        try:
            made.start()
            yield made
        finally:
            made.kill()
            database.stop()


@pytest.fixture
def served(kit: Any, server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kit, registering at the server; the login comes from the environment only."""
    for key, value in server.login.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("NVEMBED_CACHE", str(Path(kit.out, "cache")))
    store = Store(server.uri, server.uri, None)
    register = RegisterConfig(auto_promote=True, gate=GateConfig(samples=200))

    def config(**changes: Any) -> Any:
        return registration_config(register, NAME, "tiny", "nvembed", store, None).model_copy(update=changes)

    monkeypatch.setattr(kit, "config", config)
    return kit


def test_without_the_password_every_request_is_refused(
    served: Any, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{server.uri}/api/2.0/mlflow/registered-models/search", timeout=20)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(Exception, match=r"401|authenticat"):
        served.register("w", 0.5)


def test_register_promote_race_rollback_export(served: Any, server: MlflowServer, folders: dict[str, Path]) -> None:
    """The whole life of a champion over HTTP; files come back from the server, checked."""
    first = served.register("a", 0.5)
    assert first["promoted"] and first["gate"]["passed"], first
    assert not served.register("b", 0.3)["promoted"]
    better = served.register("c", 0.6)
    assert better["promoted"] and better["champion_before"]["version"] == "1"
    client = open_registry(server.uri)
    assert aliases(client, NAME) == {"candidate": "3", "champion": "3"}
    assert roll_back(client, NAME) == ("3", "1")

    outputs = race(server.uri, NAME, ["2", "3"], {**os.environ, **server.login})
    assert sorted(line.split()[0] for line in outputs) == ["refused", "won"], outputs
    assert aliases(client, NAME)["champion"] == ("2" if outputs[0] == "won" else "3")
    assert model_names(client) == [NAME], "no lock is left"

    version = list_versions(client, NAME)[2]
    done = export_version(client, server.uri, version, Path(served.out, "exported"))
    assert done["content_hash"] == better["content_hash"]
    assert (Path(served.out, "exported", "note.txt")).read_text() == "c"
    assert "| cwe | nDCG@10 | 0.6000" in Path(served.out, "exported", "README.md").read_text()
    assert resolve_model(f"models:/{NAME}/3", server.uri).startswith(str(Path(served.out, "cache")))
    stored = json.dumps([dict(version.tags) for version in list_versions(client, NAME)])
    assert server.password not in stored


class StepConfig(Config):
    """A step's config."""

    steps: int = 3


def test_a_server_killed_in_mid_run_gets_the_backlog_once(
    served: Any, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training continues without it; its metrics are sent when it is back, each row once."""
    monkeypatch.setattr(tracker, "RETRY_SECONDS", 0.5)
    live = storage.join(served.out, "train", "metrics.jsonl")

    def write(rows: int) -> None:
        lines = [json.dumps({"step": step, "loss": 1.0 / (step + 1), "time": 1.79e9 + step}) for step in range(rows)]
        storage.write_bytes(live, "".join(line + "\n" for line in lines).encode())

    tracking = Tracker(TrackingConfig(uri=server.uri), served.out, {"name": "tiny"}, "tiny")
    with tracking.step("train", StepConfig()) as handle:
        write(5)
        assert handle.tail()
        server.kill()
        write(9)
        assert not handle.tail()
        with pytest.raises(RegistryAwayError, match="does not answer"):
            served.register("d", 0.55)
        assert not tracking.sync()
        server.start()
        write(12)
    assert tracking.close()
    client = open_registry(server.uri)
    metrics = client.get_metric_history(handle.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in metrics) == [(step, 1.0 / (step + 1)) for step in range(12)]
    assert client.get_run(tracking.parent_run_id).info.status == "FINISHED"
    assert served.register("d", 0.55)["version"] == str(len(list_versions(client, NAME))), "registered when it is back"
