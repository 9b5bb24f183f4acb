"""Calls of kubectl, with a stub that records them; no Kubernetes runs here."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from nvembed.commands.app import app

STUB = """#!/bin/sh
here={here}
echo "$@" >> $here/calls
case "$*" in
  *"get rayjob "*) [ -e $here/away ] && rm $here/away && echo "i/o timeout" >&2 && exit 1 ;;
esac
case "$*" in
  *"apply -f -"*) cat > $here/applied.yaml ;;
  *"get rayjobs"*) cat $here/items.json ;;
  *"get rayjob "*) cat $here/item.json ;;
  *"get rayjob/"*) printf uid-1 ;;
  *"logs job/"*) printf 'line 1\\nline 2\\n' ;;
esac
"""


@pytest.fixture
def kubectl(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "kubectl").write_text(STUB.format(here=stubs))
    (stubs / "kubectl").chmod(0o755)
    (stubs / "items.json").write_text('{"items": []}')
    monkeypatch.setenv("PATH", f"{stubs}:/usr/bin:/bin")
    (checkout / "t.yaml").write_text(
        "type: kuberay\nimage: i\nnamespace: team\ncontext: prod\noutputs: /shared/runs\n"
        "storage: {type: claim, claim: c, mount_path: /shared}\n"
    )
    return stubs


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    return done.exit_code, done.stdout, done.stderr


def item(folder: Path, **status: str) -> str:
    """What the API server would answer for the job that was applied."""
    ray_job = list(yaml.safe_load_all((folder / "applied.yaml").read_text()))[1] | {"status": status}
    (folder / "item.json").write_text(json.dumps(ray_job))
    (folder / "items.json").write_text(json.dumps({"items": [ray_job]}))
    return str(ray_job["metadata"]["name"])


def test_apply_list_follow_and_delete(kubectl: Path) -> None:
    command = ("--", "python", "light.py")
    code, output, notes = run("submit", "t.yaml", "--no-wait", *command)
    assert code == 0 and output.strip().startswith("nvembed-light-"), notes
    calls = (kubectl / "calls").read_text().splitlines()
    assert "--context prod -n team apply -f -" in calls
    name = item(kubectl, jobStatus="RUNNING", jobDeploymentStatus="Running")
    assert name == output.strip()
    patch = calls[-1].partition(f"patch configmap/{name} --type=merge --patch=")[2]
    owner = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": name, "uid": "uid-1"}
    assert json.loads(patch) == {"metadata": {"ownerReferences": [owner]}}, "who deletes the RayJob deletes its recipe"
    code, _, notes = run("submit", "t.yaml", *command)
    assert code == 2 and f"this run is running as {name}" in notes
    assert f"{name}  running" in run("jobs", "list", "t.yaml")[1]
    item(kubectl, jobStatus="FAILED", jobDeploymentStatus="Failed", message="failed with exit code 2, last")
    code, output, notes = run("jobs", "logs", "t.yaml", "--follow")
    assert code == 2 and output == "line 1\nline 2\n" and "failed, exit code 2" in notes
    code, output, _ = run("submit", "t.yaml", "--no-wait", *command)
    assert output.strip() == name[:-1] + "2", "the next try has a name of its own"
    item(kubectl, jobStatus="RUNNING", jobDeploymentStatus="Running")
    code, output, _ = run("jobs", "stop", "t.yaml", "--json")
    assert code == 0 and json.loads(output)["asked"]
    assert f"delete rayjob/{name[:-1]}2 configmap/{name[:-1]}2" in (kubectl / "calls").read_text()


def test_an_api_server_that_does_not_answer_for_a_while_is_called_again(kubectl: Path) -> None:
    name = run("submit", "t.yaml", "--no-wait", "--", "python", "light.py")[1].strip()
    item(kubectl, jobStatus="SUCCEEDED", jobDeploymentStatus="Complete")
    (kubectl / "away").touch()
    code, output, notes = run("jobs", "logs", "t.yaml", name, "--follow")
    assert code == 0 and output == "line 1\nline 2\n", notes
    assert "i/o timeout); the job continues, trying again" in notes


def test_a_job_that_is_deleted_while_it_is_followed_was_stopped(kubectl: Path) -> None:
    name = run("submit", "t.yaml", "--no-wait", "--", "python", "light.py")[1].strip()
    item(kubectl, jobStatus="RUNNING", jobDeploymentStatus="Running")
    (kubectl / "item.json").write_text("")  # what --ignore-not-found leaves
    code, _, notes = run("jobs", "logs", "t.yaml", name, "--follow")
    assert code == 130 and "stopped, exit code 130 deleted" in notes


@pytest.mark.parametrize(
    ("status", "deployment", "state"),
    [
        ("STOPPED", "Complete", "stopped"),
        ("STOPPED", "Suspended", "pending"),
        ("FAILED", "Retrying", "running"),
        ("FAILED", "Failed", "failed"),
        ("SUCCEEDED", "Complete", "succeeded"),
        ("", "Failed", "failed"),
        ("RUNNING", "Running", "running"),
    ],
)
def test_states_of_kuberay(kubectl: Path, status: str, deployment: str, state: str) -> None:
    name = run("submit", "t.yaml", "--no-wait", "--", "python", "light.py")[1].strip()
    item(kubectl, jobStatus=status, jobDeploymentStatus=deployment)
    assert f"{name}  {state}" in run("jobs", "list", "t.yaml")[1]


def test_the_end_of_the_log_is_in_no_message(kubectl: Path) -> None:
    """Ray appends it to the job's message and KubeRay passes that on; it may hold texts of the data."""
    name = run("submit", "t.yaml", "--no-wait", "--", "python", "light.py")[1].strip()
    tail = "Job entrypoint command failed with exit code -9, last available logs (truncated to 20,000 chars):\n"
    item(kubectl, jobStatus="FAILED", jobDeploymentStatus="Failed", message=f"{tail}a private text\nexit code 5")
    shown = [run("jobs", what, "t.yaml", *more) for what in ("list", "status") for more in ((), ("--json",))]
    assert all(code == 0 and "private" not in output + notes for code, output, notes in shown)
    assert json.loads(shown[-1][1])["message"] == "Failed Job entrypoint command failed with exit code -9"
    code, output, notes = run("jobs", "logs", "t.yaml", name, "--follow")
    assert code == 137 and "private" not in output + notes, "killed by signal 9, in the form of a shell"


def test_a_cluster_that_forbids_patch_runs_the_job_nevertheless(kubectl: Path) -> None:
    stub = (kubectl / "kubectl").read_text()
    (kubectl / "kubectl").write_text(
        stub.replace('case "$*" in', 'case "$*" in *patch*) echo forbidden >&2; exit 1 ;; esac\ncase "$*" in', 1)
    )
    code, output, notes = run("submit", "t.yaml", "--no-wait", "--", "python", "light.py")
    assert code == 0 and f"delete configmap/{output.strip()} yourself" in notes and "forbidden" in notes


def test_kubectls_own_message_is_passed_on(kubectl: Path) -> None:
    (kubectl / "kubectl").write_text("#!/bin/sh\necho 'error: no kind RayJob' >&2\nexit 1\n")
    code, _, notes = run("jobs", "list", "t.yaml")
    assert code == 3 and "error: no kind RayJob" in notes
