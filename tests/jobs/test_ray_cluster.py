"""`nvembed submit` and `nvembed jobs` against a real Ray head on loopback with token authentication."""

import contextlib
import http.server
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
CANARY = "canary-9d1c7e"  # a secret of the submitter that must stay with the submitter


class Nvembed:
    """The command, with the cluster's token and a target file for it."""

    def __init__(self, head: Any, checkout: Path) -> None:
        self.out = checkout.parent / "out"
        self.target = checkout / "target.yaml"
        self.target.write_text(
            f"type: ray\naddress: {head.address}\nsecrets: [RAY_AUTH_TOKEN]\nenv_vars: {{PLAIN: 'a b'}}\n"
            f"outputs: {self.out}\nstop_wait_seconds: 20\n"
        )
        self.checkout = checkout
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= {"RAY_AUTH_TOKEN": head.token, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        self.environment |= {"HF_TOKEN": CANARY}
        self.environment |= {"RAY_ADDRESS": "http://127.0.0.1:1"}  # the target says where, not this

    def __call__(self, *arguments: str, code: int = 0, **environment: str) -> tuple[str, str]:
        done = subprocess.run(
            self._line(arguments), capture_output=True, text=True, timeout=200, cwd=self.checkout,
            env=self.environment | environment,
        )  # fmt: skip
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert self.environment["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr
        assert CANARY not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self._line(arguments), stdout=pipe, stderr=pipe, text=True, cwd=self.checkout, env=self.environment
        )

    def _line(self, arguments: tuple[str, ...]) -> list[str]:
        target = ["target.yaml" if part == "TARGET" else part for part in arguments]
        return [sys.executable, "-m", "nvembed.cli", *target]

    def submit(self, name: str, *options: str, code: int = 0) -> tuple[str, str]:
        command = ["python", "light.py", "--set", f"name={name}"]
        return self("submit", "TARGET", *options, "--", *command, code=code)

    def states(self) -> list[dict[str, Any]]:
        return list(json.loads(self("jobs", "list", "TARGET", "--json")[0]))


class Wire:
    """A TCP proxy to the head that can be cut: a network that goes away and comes back; with `tls`, what ends TLS."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._port, self._open, self.up, self._tls = port, list[socket.socket](), True, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.refused = list[str]()  # what went wrong in handshakes
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self.up:
                near.close()
                continue
            if self._tls is not None:
                try:
                    near = self._tls.wrap_socket(near, server_side=True)
                except OSError as error:
                    self.refused.append(str(error))
                    near.close()
                    continue
            far = socket.create_connection(("127.0.0.1", self._port))
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """Break every connection and refuse new ones."""
        self.up = False
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def nvembed(head: Any, checkout: Path) -> Nvembed:
    return Nvembed(head, checkout)


def test_a_job_runs_on_the_cluster_and_is_listed(nvembed: Nvembed, head: Any) -> None:
    (nvembed.checkout / "ignored.txt").write_text("stays here")
    output, notes = nvembed.submit("light")
    first = nvembed.states()[-1]
    assert first["id"].startswith("nvembed-light-") and first["id"].endswith("-1")
    assert f"{first['id']}: succeeded, exit code 0" in notes
    assert (
        "attempt 1 of light" in output and "cpus 3.0" in output and "plain a b" in output and "same node True" in output
    )
    assert first["state"] == "succeeded" and first["exit_code"] == 0 and first["ended"] > first["started"]
    about = first["metadata"]
    assert about["nvembed_recipe"] == "light" and len(about["nvembed_recipe_sha256"]) == 64 and about["user"]
    assert len(about["git_revision"]) == 40, "an untracked target file is no change"
    request = urllib.request.Request(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    known = urllib.request.urlopen(request, timeout=30).read().decode()
    assert first["id"] in known and CANARY not in known and head.token not in known, (
        "which every user of the cluster sees"
    )


def test_the_exit_code_is_the_runs_and_a_second_try_resumes(nvembed: Nvembed) -> None:
    output, notes = nvembed.submit("wrong", code=2)
    assert "this pipeline is meant to fail" in output and "failed, exit code 2" in notes
    output, notes = nvembed.submit("wrong", code=2)
    assert "attempt 2 of wrong" in output, "the second run resumed the first one's output"
    wrong = [state for state in nvembed.states() if state["metadata"]["nvembed_recipe"] == "wrong"]
    assert [state["id"].rpartition("-")[2] for state in wrong] == ["1", "2"]
    assert wrong[0]["id"].rpartition("-")[0] == wrong[1]["id"].rpartition("-")[0]
    output, _ = nvembed("jobs", "status", "TARGET", wrong[0]["id"])
    assert "failed (exit code 2)" in output and f"nvembed_out: {nvembed.out}/wrong" in output
    assert "attempt 1 of wrong" in nvembed("jobs", "logs", "TARGET", wrong[0]["id"])[0]
    assert "attempt 2 of wrong" in nvembed("jobs", "logs", "TARGET", "-f", code=2)[0], "the newest, to its end"


def test_detach_refuse_a_second_one_reattach_and_stop(nvembed: Nvembed) -> None:
    process = nvembed.start("submit", "TARGET", "--", "python", "light.py", "--set", "name=waits")
    assert process.stdout is not None
    while "same node" not in (line := process.stdout.readline()):
        assert line or process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "continues" in said and "nvembed jobs stop target.yaml nvembed-waits-" in said
    alive = [state for state in nvembed.states() if state["state"] == "running"]
    assert len(alive) == 1
    _, refused = nvembed.submit("waits", code=2)
    assert f"this run is running as {alive[0]['id']}" in refused
    follower = nvembed.start("jobs", "logs", "TARGET", alive[0]["id"], "--follow")
    time.sleep(4)
    output, _ = nvembed("jobs", "stop", "TARGET")
    assert output.strip() == f"{alive[0]['id']}: asked to stop"
    log, notes = follower.communicate(timeout=60)
    assert follower.returncode == 130 and "stopped, exit code 130" in notes
    assert "attempt 1 of waits" in log and "interrupted; run the same command again to resume" in log
    assert "has ended already (stopped)" in nvembed("jobs", "stop", "TARGET", alive[0]["id"])[0]
    assert "no job of nvembed is alive here" in nvembed("jobs", "stop", "TARGET", code=2)[1]


def test_following_survives_a_lost_connection_and_says_nothing_twice(nvembed: Nvembed, head: Any) -> None:
    wire = Wire(int(head.address.rpartition(":")[2]))
    nvembed.target.write_text(nvembed.target.read_text().replace(head.address, wire.address))
    process = nvembed.start("submit", "TARGET", "--", "python", "light.py", "--set", "name=counts")
    assert process.stdout is not None and process.stderr is not None
    output = ""
    while "count 3\n" not in output:
        line = process.stdout.readline()
        assert line or process.poll() is None, process.communicate()
        output += line
    wire.cut()
    notes = ""
    while "connection lost" not in notes:
        line = process.stderr.readline()
        assert line, notes
        notes += line
    wire.up = True
    rest, more = process.communicate(timeout=120)
    wire.close()
    counted = [line for line in (output + rest).splitlines() if line.startswith("count ")]
    assert counted == [f"count {number}" for number in range(20)], "no line is missing, none comes twice"
    assert process.returncode == 0 and "the job continues, trying again" in notes and "succeeded, exit code 0" in more


def test_wrong_and_missing_tokens_and_a_cluster_that_is_not_there(nvembed: Nvembed, tmp_path: Path) -> None:
    before, text = nvembed.states(), nvembed.target.read_text()
    command = ("submit", "TARGET", "--", "python", "light.py")
    _, output = nvembed(*command, code=3, RAY_AUTH_TOKEN="0" * 32)
    assert "refused the token" in output and "RAY_AUTH_TOKEN" in output
    _, output = nvembed(*command, code=3, RAY_AUTH_TOKEN="", HOME=str(tmp_path))
    assert "no token for the cluster: set RAY_AUTH_TOKEN" in output
    nvembed.target.write_text("type: ray\naddress: http://127.0.0.1:9\noutputs: /tmp/x\n")
    _, output = nvembed(*command, code=3)
    assert "http://127.0.0.1:9 cannot be reached" in output
    nvembed.target.write_text(text)
    assert nvembed.states() == before, "nothing was sent"


def authority(folder: Path, name: str) -> tuple[Path, Path, Path]:
    """A private authority by openssl, and what it signed for 127.0.0.1: its certificate, the server's and its key."""
    folder.mkdir(exist_ok=True)
    own, own_key, server, key = (folder / f"{name}{end}" for end in (".crt", ".key", "-server.crt", "-server.key"))
    new = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    usage = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    run([*new, "-subj", f"/CN={name}", *usage[2:], "-keyout", str(own_key), "-out", str(own)])
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
    signed = ["-CA", str(own), "-CAkey", str(own_key), "-subj", "/CN=head", *names]
    run([*new, *signed, "-keyout", str(key), "-out", str(server)])
    return own, server, key


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_cluster_behind_tls_with_an_authority_of_its_own(nvembed: Nvembed, head: Any, tmp_path: Path) -> None:
    """A real head behind what ends TLS. With the wrong authority the token does not leave this machine."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificates with openssl")
    own, server, key = authority(tmp_path / "tls", "ours")
    other, _, _ = authority(tmp_path / "tls", "others")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(server, key)
    wire = Wire(int(head.address.rpartition(":")[2]), tls)
    plain = nvembed.target.read_text().replace(head.address, wire.address) + f"shared_paths: [{nvembed.out}]\n"
    nvembed.target.write_text(f"{plain}verify: {own}\n")
    output, notes = nvembed.submit("light")
    assert "attempt 1 of light" in output and "succeeded, exit code 0" in notes, "the log's websocket too"
    assert not wire.refused
    nvembed.target.write_text(plain)
    output, _ = nvembed("jobs", "logs", "TARGET", "--follow", REQUESTS_CA_BUNDLE=str(own))
    assert "attempt 1 of light" in output, "as requests and curl take it; the websocket too"
    mistakes = {f"verify: {other}\n": "certificate verify failed", "": "certificate verify failed"}
    for verify, why in mistakes.items():
        nvembed.target.write_text(plain + verify)
        for command in (("submit", "TARGET", "--", "python", "light.py"), ("jobs", "list", "TARGET")):
            started = time.monotonic()
            _, message = nvembed(*command, code=3)
            assert f"{wire.address}: no TLS with it" in message and why in message and "`verify`" in message
            assert time.monotonic() - started < 60, "asking again would not help"
    assert len(wire.refused) >= 4, "it came as far as the certificate, and no further"
    nvembed.target.write_text(f"{plain}verify: {tmp_path}/none.crt\n")
    assert "the certificate cannot be checked" in nvembed("jobs", "list", "TARGET", code=3)[1]
    nvembed.target.write_text(plain.replace("https://", "http://") + "plain_http: true\n")
    assert "cannot be reached" in nvembed("jobs", "list", "TARGET", code=3)[1]
    nvembed.target.write_text(f"{plain}verify: {own}\n".replace(wire.address, head.address.replace("http", "https")))
    assert "no TLS with it" in nvembed("jobs", "list", "TARGET", code=3)[1], "plain http where TLS is expected"
    wire.close()


def test_a_cluster_that_answers_without_a_token_is_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is a stub that answers without a token, as a Ray head with RAY_AUTH_MODE=disabled does."""
    from nvembed.jobs.config import RayTarget
    from nvembed.jobs.ray.backend import RayBackend
    from nvembed.preflight.findings import PreflightError

    class Open(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"} if "version" in self.path else []
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    monkeypatch.setenv("RAY_AUTH_TOKEN", "any-token")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Open) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(PreflightError, match="answers without a token: anyone who reaches it can run code"):
            RayBackend(RayTarget(address=address)).states()
        assert RayBackend(RayTarget(address=address, authentication="disabled")).states() == []
        server.shutdown()


def test_a_secret_that_the_cluster_lacks(nvembed: Nvembed) -> None:
    nvembed.target.write_text(nvembed.target.read_text().replace("[RAY_AUTH_TOKEN]", "[HF_TOKEN]"))
    output, _ = nvembed.submit("light", "--wait", code=3)
    assert "HF_TOKEN is not set where the driver runs" in output


def test_no_wait_and_json(nvembed: Nvembed) -> None:
    output, notes = nvembed.submit("later", "--no-wait", "--json")
    submitted = json.loads(output)
    assert submitted["out"] == f"{nvembed.out}/later" and f"jobs logs target.yaml {submitted['id']} --follow" in notes
    log, _ = nvembed("jobs", "logs", "TARGET", submitted["id"], "--follow")
    assert "attempt 1 of later" in log


def test_a_cloud_job_is_ray_up_then_the_same_job(nvembed: Nvembed, head: Any, tmp_path: Path) -> None:
    """`ray` on the submitting machine is a stub that records the file of `ray up`; the head behind the port is real."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "ray").write_text(
        f'#!/bin/sh\necho "$@" >> {stubs}/calls\nfor part; do last="$part"; done\ncp "$last" {stubs}\n'
    )
    (stubs / "ray").chmod(0o755)
    (tmp_path / "token").write_text(head.token)
    nvembed.target.write_text(
        "type: cloud\ncluster_name: trial\nprovider: {type: aws, region: r}\nimage: i\nbucket: s3://b\n"
        f"mount_path: {nvembed.out}\noutputs: {nvembed.out}\nlocal_port: {head.address.rpartition(':')[2]}\n"
        "head: {machine: m, cpus: 2}\nworkers: [{machine: m, cpus: 2, gpus: 1}]\n"
    )
    nvembed.environment |= {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    nvembed.environment["PATH"] = f"{stubs}:{os.environ['PATH']}"
    command = ["python", "light.py", "--set", "name=cloudy"]
    done = subprocess.run(
        nvembed._line(("submit", "TARGET", "--", *command)), capture_output=True, text=True, cwd=nvembed.checkout,
        env=nvembed.environment, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and "attempt 1 of cloudy" in done.stdout, done.stderr
    steps = [line.rpartition(" ")[0] for line in (stubs / "calls").read_text().splitlines()]
    assert steps == ["get-head-ip", "up --yes --no-config-cache"]
    written = (stubs / "trial.yaml").read_text()
    assert "InstanceMarketOptions" in written and head.token not in written + done.stdout + done.stderr
    waits = nvembed.start("submit", "TARGET", "--", "python", "light.py", "--set", "name=waits")
    assert waits.stdout is not None
    while "same node" not in (line := waits.stdout.readline()):
        assert line or waits.poll() is None, waits.communicate()
    ups = (stubs / "calls").read_text().count("up --yes")
    done = subprocess.run(
        nvembed._line(("submit", "TARGET", "--no-wait", "--", *command[:-1], "name=beside")),
        capture_output=True, text=True, cwd=nvembed.checkout, env=nvembed.environment, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and "no `ray up` while nvembed-waits-" in done.stderr, done.stderr
    assert (stubs / "calls").read_text().count("up --yes") == ups, "it starts Ray anew and would end the other's job"
    nvembed.environment["RAY_AUTH_TOKEN"] = head.token  # the same as in the file; searched in the output
    alive = json.loads(nvembed("jobs", "list", "TARGET", "--json")[0])
    nvembed(
        "jobs",
        "stop",
        "TARGET",
        next(job["id"] for job in alive if "nvembed-waits-" in job["id"] and job["state"] == "running"),
    )
    assert waits.wait(timeout=60) == 130
