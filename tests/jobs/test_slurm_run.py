"""The rendered batch script under stubs of Slurm's commands, with a real `ray symmetric-run`, on this one host.

`symmetric-run` ends with `ray stop`, which ends every Ray of the machine: the job runs in a pid namespace of its own.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = (
    ["unshare", "--pid", "--fork", "--mount-proc"],
    ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"],
)
STUBS = {
    # takes the script, runs it as job 77 on "this node", remembers its name and comment while it runs
    "sbatch": """
        cat > "$SLURM_STUB/script.sh"
        for option in "$@"; do case "$option" in --comment=*) comment="${option#--comment=}" ;; esac; done
        name=$(sed -n 's/^#SBATCH --job-name=//p' "$SLURM_STUB/script.sh")
        log=$(sed -n 's/^#SBATCH --output=//p' "$SLURM_STUB/script.sh" | sed "s/%x/$name/; s/%j/77/")
        cd "$(sed -n 's/^#SBATCH --chdir=//p' "$SLURM_STUB/script.sh")"
        echo "77|RUNNING|2026-01-01T00:00:00|None|$name|$comment" > "$SLURM_STUB/queue"
        ( SLURM_JOB_ID=77 $SLURM_STUB_NAMESPACE bash "$SLURM_STUB/script.sh" >> "$log" 2>&1 &
          echo $! > "$SLURM_STUB/pid"
          wait $!; rm "$SLURM_STUB/queue" ) < /dev/null > /dev/null 2>&1 &
        echo "77;stub"
    """,
    "srun": """
        while [ "${1#--}" != "$1" ]; do shift; done
        SLURM_PROCID=0 exec "$@"
    """,
    "squeue": 'cat "$SLURM_STUB/queue" 2>/dev/null || true',
    "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
    "scontrol": 'echo "$@" >> "$SLURM_STUB/requeues"',
}


@pytest.fixture
def slurm(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A "cluster": stubs on the PATH, a target file; the stubs' directory."""
    works = [prefix for prefix in NAMESPACES if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0]
    if not works:
        pytest.skip("no pid namespaces here: `ray symmetric-run` would end other Rays of this machine")
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    temporary = Path("/tmp") / f"nvs-{secrets.token_hex(3)}"  # sockets: the path must be short
    bin_dir = Path(sys.executable).parent
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{stubs}:{bin_dir}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STUB", str(stubs))
    monkeypatch.setenv("SLURM_STUB_NAMESPACE", " ".join(works[0]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (checkout / "target.yaml").write_text(
        f"type: slurm\ntemp_dir: {temporary}\nshared_dir: {tmp_path}/shared\nworking_dir: {checkout}\n"
        f"outputs: {tmp_path}/out\n"
        f"cpus_per_node: 3\nsetup: ['source {bin_dir}/activate']\nray_options:\n- --object-store-memory={100 * 2**20}\n"
        f"- --ray-client-server-port={_free_port()}\n- --dashboard-agent-listen-port={_free_port()}\n"
    )
    monkeypatch.setenv("NODE_TEMP", str(temporary))
    yield stubs
    shutil.rmtree(temporary, ignore_errors=True)


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def submit(name: str, *options: str) -> list[str]:
    command = ["submit", "target.yaml", *options, "--", "python", "light.py", "--set", f"name={name}"]
    return [sys.executable, "-m", "nvembed.cli", *command]


def run(command: list[str], timeout: int = 240) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_job_runs_under_symmetric_run_and_its_token_is_private(slurm: Path, tmp_path: Path) -> None:
    code, output = run(submit("looks"))
    assert code == 0, output
    assert "attempt 1 of looks" in output and "cpus 3.0" in output and "77: succeeded, exit code 0" in output
    assert "token 0o600 0" in output, "readable by the owner only, and on no command line"
    left = sorted(path.name for path in (tmp_path / "shared/jobs/77").iterdir())
    assert left == ["driver.sh", "exit_code", "job.json", "recipe.yaml"]
    assert not (slurm / "requeues").exists()
    assert os.listdir(os.environ["NODE_TEMP"]) == [], "the node is left clean"
    code, output = run(submit("wrong"))
    assert code == 2 and "this pipeline is meant to fail" in output and "77: failed, exit code 2" in output


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_ahead_of_the_time_limit_the_job_is_requeued_and_stopped_it_is_not(
    slurm: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    code, output = run(submit("waits", "--no-wait"))
    assert code == 0 and "77" in output, output
    log = next((tmp_path / "shared/logs").glob("nvembed-waits-*-77.log"), tmp_path / "none")
    deadline = time.monotonic() + 200
    while "same node" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline and (slurm / "queue").exists(), log.read_text()
        time.sleep(1)
        log = next((tmp_path / "shared/logs").glob("nvembed-waits-*-77.log"), log)
    code, output = run(submit("waits"))
    assert code == 2 and "this run is running as 77" in output
    [batch] = psutil.Process(int((slurm / "pid").read_text())).children()  # below unshare; Slurm signals the shell only
    batch.send_signal(sent)
    _, alive = psutil.wait_procs([batch], timeout=120)
    assert not alive
    output = log.read_text()
    assert "interrupted; run the same command again" in output and "the run ended with exit code 130" in output
    if sent == signal.SIGTERM:  # as scancel does
        assert "not requeued" in output and not (slurm / "requeues").exists()
        return
    assert "the time limit is near" in output and "requeued; the next attempt resumes" in output
    assert (slurm / "requeues").read_text().strip() == "requeue 77"
