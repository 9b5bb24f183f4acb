"""States of a Slurm job from the queue, accounting and our own files: stubs of Slurm's commands, a real shell."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nvembed.commands.app import app

STUBS = {
    "sbatch": 'cat > "$SLURM_STUB/script.sh"; echo "77;stub"',
    "scancel": 'rm "$SLURM_STUB/queue"',
    "squeue": 'cat "$SLURM_STUB/queue" 2>/dev/null || true',
    "sacct": '[ -f "$SLURM_STUB/accounts" ] || exit 1; cat "$SLURM_STUB/accounts"',
}
COMMAND = ("--", "python", "light.py")


@pytest.fixture
def slurm(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stubs that record their input; the target is in the checkout."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{stubs}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_STUB", str(stubs))
    monkeypatch.setattr("nvembed.jobs.slurm.backend.POLL_SECONDS", 0.05)
    target(checkout)
    return stubs


def target(checkout: Path, more: str = "") -> None:
    shared = checkout.parent / "shared"
    text = f"type: slurm\nshared_dir: {shared}\nworking_dir: {checkout}\noutputs: {checkout.parent}/out\n{more}"
    (checkout / "target.yaml").write_text(text)


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})
    return done.exit_code, done.stdout, done.stderr


def job(folder: Path) -> Path:
    """Submit job 77; its folder on the shared storage."""
    code, output, notes = run("submit", "target.yaml", "--no-wait", *COMMAND)
    assert code == 0 and output.strip() == "77", notes
    return folder.parent / "shared/jobs/77"


def status() -> dict[str, object]:
    code, output, notes = run("jobs", "status", "target.yaml", "77", "--json")
    assert code == 0, notes
    return dict(json.loads(output))


@pytest.mark.parametrize(
    ("left", "state", "code", "ends"),
    [("0", "succeeded", 0, 0), ("2", "failed", 2, 2), ("130", "stopped", 130, 130), (None, "failed", None, 4)],
)
def test_without_accounting_our_own_files_are_read(
    slurm: Path, checkout: Path, left: str | None, state: str, code: int | None, ends: int
) -> None:
    folder = job(checkout)
    assert folder.stat().st_mode & 0o777 == 0o700
    if left is not None:
        (folder / "exit_code").write_text(left)
    state_now = status()
    assert (state_now["state"], state_now["exit_code"]) == (state, code)
    about = state_now["metadata"]
    assert isinstance(about, dict) and about["nvembed_recipe"] == "light" and len(about["git_revision"]) == 40
    assert (state_now["ended"] is None) is (left is None)
    assert f"77  {state}" in run("jobs", "list", "target.yaml")[1]
    assert run("jobs", "logs", "target.yaml", "77", "--follow")[0] == ends


@pytest.mark.parametrize(
    ("accounts", "left", "state", "code", "ends"),
    [
        ("TIMEOUT|0:0", None, "failed", None, 4),
        ("TIMEOUT|0:15", None, "failed", 143, 143),
        ("OUT_OF_MEMORY|0:125", None, "failed", None, 4),
        ("OUT_OF_MEMORY|0:125", "137", "failed", 137, 137),
        ("NODE_FAIL|0:0", None, "failed", None, 4),
        ("NODE_FAIL|0:0", "0", "succeeded", 0, 0),
        ("FAILED|3:0", None, "failed", 3, 3),
        ("CANCELLED by 1000|0:0", None, "stopped", None, 130),
        ("COMPLETED|0:0", None, "succeeded", 0, 0),
        ("RUNNING|0:0", None, "running", None, None),
    ],
)
def test_what_only_accounting_knows(
    slurm: Path, checkout: Path, accounts: str, left: str | None, state: str, code: int | None, ends: int | None
) -> None:
    folder = job(checkout)
    if left is not None:
        (folder / "exit_code").write_text(left)
    reported, number = accounts.split("|")  # AccountingStoreFlags without job_comment: no comment comes back
    (slurm / "accounts").write_text(f"77|{reported}|2026-01-01T00:00:00|Unknown|{number}|nvembed-light-x|\n")
    state_now = status()
    assert (state_now["state"], state_now["exit_code"]) == (state, code)
    about = state_now["metadata"]
    assert isinstance(about, dict) and about["nvembed_recipe"] == "light", "ours, where accounting keeps no comment"
    assert "exit code 0" not in run("jobs", "list", "target.yaml")[1] or code == 0
    if ends is not None:
        assert run("jobs", "logs", "target.yaml", "77", "--follow")[0] == ends


def test_the_queue_overrides_the_files_of_an_earlier_attempt(slurm: Path, checkout: Path) -> None:
    (job(checkout) / "exit_code").write_text("130")
    (slurm / "queue").write_text("77|PENDING|N/A|BeginTime|nvembed-light-x|\n")
    assert status()["state"] == "pending"
    code, _, notes = run("submit", "target.yaml", *COMMAND)
    assert code == 2 and "this run is pending as 77" in notes


def test_a_job_that_is_stopped_while_it_waits(slurm: Path, checkout: Path) -> None:
    job(checkout)
    (slurm / "queue").write_text("77|PENDING|N/A|Priority|nvembed-light-x|\n")
    assert run("jobs", "stop", "target.yaml")[0] == 0
    assert status()["state"] == "stopped" and run("jobs", "logs", "target.yaml", "77", "--follow")[0] == 130


def test_missing_secrets_are_reported_before_the_queue(
    slurm: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target(checkout, "secrets: [NV_A, NV_B]\n")
    monkeypatch.setenv("NV_A", "canary-5e5e")
    code, _, notes = run("submit", "target.yaml", *COMMAND)
    assert code == 3 and "NV_B: not set here" in notes and "NV_A" not in notes
    assert not (slurm / "script.sh").exists(), "nothing was submitted"
    monkeypatch.setenv("NV_B", "canary-6f6f")
    assert run("submit", "target.yaml", "--no-wait", *COMMAND)[0] == 0
    assert "canary" not in (slurm / "script.sh").read_text()
    keys = checkout.parent / "keys"
    keys.write_text("NV_A=x\n")
    keys.chmod(0o644)
    target(checkout, f"secrets: [NV_A]\nsecrets_file: {keys}\n")
    monkeypatch.delenv("NV_A")
    code, _, notes = run("submit", "target.yaml", *COMMAND)
    assert code == 3 and "mode 644; run: chmod 600" in notes
    keys.chmod(0o600)
    assert run("submit", "target.yaml", "--no-wait", *COMMAND)[0] == 0, "the file may have it"
    keys.unlink()
    code, _, notes = run("submit", "target.yaml", "--no-wait", *COMMAND)
    assert code == 0 and "not seen from here" in notes


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        ("secrets: [NV_A]\n", 3, "error: NV_A is not set in the job"),
        ("setup: ['exit 7']\n", 7, ""),
        ("setup: ['source /no/such/activate']\n", 1, "/no/such/activate"),
    ],
)
def test_a_job_that_ends_before_its_run_leaves_its_code(
    slurm: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, more: str, code: int, message: str
) -> None:
    """The batch script itself, in bash, without accounting: the submitter's exit code is the job's."""
    target(checkout, more)
    monkeypatch.setenv("NV_A", "x")
    folder = job(checkout)
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "77", "HOME": str(checkout.parent)}
    done = subprocess.run(
        [shutil.which("bash") or "bash", str(slurm / "script.sh")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == code and message in done.stderr
    assert (folder / "exit_code").read_text().strip() == str(code)
    assert status()["exit_code"] == code and run("jobs", "logs", "target.yaml", "77", "--follow")[0] == code


def test_the_revision_is_of_the_checkout_that_runs(slurm: Path, checkout: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    shutil.copytree(checkout, there)
    (there / "light.py").write_text((there / "light.py").read_text() + "\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qam", "another"]
    subprocess.run(git, cwd=there, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=there, capture_output=True, text=True).stdout.strip()
    text = (checkout / "target.yaml").read_text().replace(f"working_dir: {checkout}", f"working_dir: {there}")
    (checkout / "target.yaml").write_text(text)
    job(checkout)
    about = status()["metadata"]
    assert isinstance(about, dict) and about["git_revision"] == head
    (there / "light.py").unlink()
    code, _, notes = run("submit", "target.yaml", *COMMAND)
    assert code == 2 and f"light.py: no such file in the target's working_dir, {there}" in notes
