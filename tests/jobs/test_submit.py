"""`nvembed submit --dry-run`: shows everything, touches nothing, opens no connection."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nvembed.commands.app import app

ROOT = Path(__file__).resolve().parents[2]
TARGETS = sorted(path.name for path in (ROOT / "cluster").glob("*.yaml"))


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return done.exit_code, done.stdout, done.stderr


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a dry run opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# each starts the pipeline's own dry run; the manifests of every kind have tests of their own in test_render.py
@pytest.mark.parametrize(
    "name",
    [name if name in ("ray.yaml", "slurm.yaml") else pytest.param(name, marks=pytest.mark.slow) for name in TARGETS],
)
def test_a_dry_run_shows_the_job_and_touches_nothing(
    checkout: Path, tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable, value in {"HF_TOKEN": "canary-1", "RAY_AUTH_TOKEN": "canary-2", "TMPDIR": str(tmp_path)}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = snapshot(tmp_path)
    command = ["--", "python", "light.py", "recipes/light.yaml", "--set", "seed_is_no_key=1"]
    code, _, notes = run("submit", str(ROOT / "cluster" / name), "--dry-run", *command)
    assert code == 2 and "seed_is_no_key" in notes
    code, shown, notes = run("submit", str(ROOT / "cluster" / name), "--dry-run", *command[:-2])
    assert code == 0, notes
    assert "light.py" in shown and "# resolved recipe, and where each value comes from" in shown
    assert re.search(r"name: light +# light.yaml:\d", shown) and "nvembed-light-" in shown
    assert "global batch: " in shown and "DeepSpeed: {" in shown and "# steps, below " in shown
    code, as_json, notes = run("submit", str(ROOT / "cluster" / name), "--dry-run", "--json", *command[:-2])
    value = json.loads(as_json)
    assert code == 0 and value["recipe"]["name"] == "light" and value["job"] and value["id"] in shown
    assert value["stages"]["stage_1"]["deepspeed"] and value["sources"]["name"]
    assert "canary" not in shown + as_json + notes
    assert snapshot(tmp_path) == before


def test_headers_come_by_reference_and_are_masked(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROXY_AUTH", "canary-3")
    (checkout / "t.yaml").write_text(
        "type: ray\naddress: https://ray.example.org\nheaders: {X-Proxy: PROXY_AUTH}\noutputs: s3://b/runs\n"
    )
    code, shown, notes = run("submit", "t.yaml", "--dry-run", "--", "python", "light.py")
    assert code == 0 and "X-Proxy: '**** (from PROXY_AUTH)'" in shown, shown + notes
    assert "Authorization: Bearer ****" in shown and "canary" not in shown


def test_a_run_that_would_not_begin_is_reported_before_the_job(checkout: Path) -> None:
    (checkout / "t.yaml").write_text("type: ray\naddress: http://127.0.0.1:1\n")
    out = checkout / "runs/mine"
    out.mkdir(parents=True)
    (out / "report.json").write_text("{}")
    code, shown, notes = run("submit", "t.yaml", "--dry-run", "--", "python", "light.py", "--out", str(out))
    assert code == 2 and not shown and "light.py would end with 2" in notes and "report.json that no run made" in notes


@pytest.mark.parametrize(("ends", "code"), [(2, 2), (3, 3), (1, 4), (5, 4)])
def test_a_dry_run_ends_as_the_pipelines_own_would(checkout: Path, ends: int, code: int) -> None:
    """The dry run itself says how; what is neither a mistake nor a preflight is a failure."""
    source = (checkout / "light.py").read_text()
    (checkout / "light.py").write_text(source.replace("raise SystemExit(main(", f"raise SystemExit({ends} or main("))
    said = run("submit", str(ROOT / "cluster/local.yaml"), "--dry-run", "--", "python", "light.py")
    assert said[0] == code and f"light.py would end with {ends}" in said[2] and not said[1]


def test_mistakes_end_with_2_and_hold_no_secret(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "canary-4")
    (checkout / "t.yaml").write_text("type: ray\naddress: canary-4\noutputs: /o\n")
    code, _, notes = run("submit", "t.yaml", "--dry-run", "--", "python", "light.py")
    assert code == 2 and "address: '****'" in notes and "canary" not in notes and "Traceback" not in notes
    code, _, notes = run("submit", str(ROOT / "cluster/local.yaml"), "--dry-run", "--", "bash", "x.sh")
    assert code == 2 and "a job is a pipeline file run by python" in notes


@pytest.mark.parametrize(("name", "tool"), [("kuberay", "kubectl"), ("slurm", "squeue"), ("aws", "ray")])
def test_a_missing_tool_is_reported_with_the_fix(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tool: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    code, _, notes = run("submit", str(ROOT / f"cluster/{name}.yaml"), "--", "python", "light.py")
    assert code == 3 and f"{tool} is not installed here" in notes
    assert run("jobs", "list", str(ROOT / f"cluster/{name}.yaml"))[0] == 3


def test_the_token_of_a_cloud_cluster_is_made_for_the_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvembed.jobs.cloud.backend import prepare_token
    from nvembed.preflight.findings import PreflightError

    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "new/token"))
    prepare_token()
    made = (tmp_path / "new/token").read_text()
    assert len(made) == 64 and (tmp_path / "new/token").stat().st_mode & 0o777 == 0o600
    prepare_token()
    assert (tmp_path / "new/token").read_text() == made
    monkeypatch.setenv("RAY_AUTH_TOKEN", "other-token")
    with pytest.raises(PreflightError, match="is not the token in"):
        prepare_token()
