"""Secrets fetched on a machine: boto3 against a real server of AWS's protocols (moto), Google's own client against a
stub of the metadata server and of Secret Manager. No cloud is contacted."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nvembed.jobs.cloud import node_secrets
from nvembed.jobs.config import CloudTarget
from nvembed.types import UserError

ROOT = Path(__file__).resolve().parents[2]
TOKEN, PASSWORD, KEY = "canary-aa11bb22", "canary-cc33dd44", "canary-ee55ff66"
MACHINE: dict[str, Any] = {"machine": "m", "cpus": 2}


def cloud(provider: dict[str, str], **more: Any) -> CloudTarget:
    bucket = {"aws": "s3://b", "gcp": "gs://b"}[provider["type"]]
    given = {"cluster_name": "c", "image": "i", "head": MACHINE, "workers": [MACHINE], **more}
    return CloudTarget.model_validate({"type": "cloud", "provider": provider, "bucket": bucket, **given})


@pytest.fixture(scope="module")
def aws() -> Iterator[CloudTarget]:
    """A target whose three secrets lie in a Secrets Manager and a Parameter Store on loopback."""
    pytest.importorskip("moto", reason="AWS's protocols on loopback: pip install 'nvembed[s3test]'")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    manager = boto3.client("secretsmanager", region_name="eu-central-1")
    manager.create_secret(Name="nvembed/hf", SecretString=f"{TOKEN}\n")
    manager.create_secret(Name="nvembed/mlflow", SecretString=json.dumps({"password": PASSWORD}))
    manager.create_secret(Name="nvembed/binary", SecretBinary=b"\xff\x00")
    store = boto3.client("ssm", region_name="eu-central-1")
    store.put_parameter(Name="/nvembed/key", Value=KEY, Type="SecureString")
    yield cloud(
        {"type": "aws", "region": "eu-central-1"},
        secrets={
            "NV_TOKEN": {"secret": "nvembed/hf"},
            "NV_PASSWORD": {"secret": "nvembed/mlflow", "key": "password"},
            "NV_KEY": {"parameter": "/nvembed/key"},
        },
    )
    monkeypatch.undo()
    server.stop()


SEES = """
import json, os, sys
line = open("/proc/self/cmdline").read()
print(json.dumps([os.environ["NV_TOKEN"], os.environ["NV_PASSWORD"], os.environ["NV_KEY"], "canary" in line]))
"""


@pytest.mark.slow
def test_a_command_gets_its_secrets_by_the_environment_only(aws: CloudTarget, tmp_path: Path) -> None:
    (tmp_path / "sees.py").write_text(SEES)
    line = node_secrets.command_with_secrets(aws, f"{sys.executable} {tmp_path}/sees.py")
    assert "canary" not in line and line.startswith("python -m nvembed.jobs.cloud.node_secrets NV_TOKEN=aws-secret:")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [TOKEN, PASSWORD, KEY, False] and not done.stderr
    assert node_secrets.command_with_secrets(cloud({"type": "aws", "region": "r"}), "x") == "x"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_jobs_on_a_machine_have_them_and_nothing_else_shows_them(
    aws: CloudTarget, start_head: Any, checkout: Path, tmp_path: Path
) -> None:
    """A real head, started as a machine of a cloud starts Ray: a job and its tasks see what was fetched."""
    text = (checkout / "light.py").read_text()
    seen = "ray.get(where.remote())\n    print('task sees', len(ray.get(sees.remote())), len(os.environ['NV_KEY']))"
    task = "@ray.remote\n    def sees() -> str:\n        return os.environ['NV_TOKEN']\n\n    "
    text = text.replace("@ray.remote", f"{task}@ray.remote", 1).replace("ray.get(where.remote())", seen, 1)
    (checkout / "light.py").write_text(text)
    with start_head(tmp_path, lambda line: node_secrets.command_with_secrets(aws, line)) as head:
        (checkout / "target.yaml").write_text(
            f"type: ray\naddress: {head.address}\noutputs: {tmp_path}/out\nsecrets: [NV_TOKEN, NV_PASSWORD, NV_KEY]\n"
        )
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        environment |= {"RAY_AUTH_TOKEN": head.token, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "nvembed.cli", "submit", "target.yaml", "--", "python", "light.py"]
        done = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0 and f"task sees {len(TOKEN)} {len(KEY)}" in done.stdout, done.stdout + done.stderr
        lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        assert any("nvembed/hf" in line or str(head.temporary) in line for line in lines)
        request = urllib.request.Request(f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
        known = urllib.request.urlopen(request, timeout=30).read().decode()
        files = [path for path in (*head.temporary.rglob("*"), *tmp_path.rglob("*")) if path.is_file()]
        assert len(files) > 20
        texts = [*lines, known, done.stdout, done.stderr, *(path.read_bytes().decode("latin-1") for path in files)]
        for value in (TOKEN, PASSWORD, KEY):
            assert not any(value in text for text in texts), "in a command line, the Jobs API, a log or a file"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("aws-secret:eu-central-1:nvembed/none", "ResourceNotFoundException"),
        ("aws-parameter:eu-central-1:/nvembed/none", "ParameterNotFound"),
        ("aws-secret:eu-central-1:nvembed/mlflow#user", "is not JSON with a field 'user'"),
        ("aws-secret:eu-central-1:nvembed/hf#password", "is not JSON with a field 'password'"),
        ("aws-secret:eu-central-1:nvembed/binary", "is binary"),
    ],
)
def test_what_cannot_be_had_ends_with_3_and_shows_nothing(
    aws: CloudTarget, capsys: pytest.CaptureFixture[str], where: str, message: str
) -> None:
    assert node_secrets.main([f"NV_X={where}", "--", "/bin/false"]) == 3
    shown = capsys.readouterr()
    assert message in shown.err and f"NV_X: {where}" in shown.err and "GetSecretValue" in shown.err
    assert "canary" not in shown.err + shown.out and "Traceback" not in shown.err


class Google(http.server.BaseHTTPRequestHandler):
    """The metadata server's token, and Secret Manager's answer to a request with it."""

    def do_GET(self) -> None:
        if "/computeMetadata/" in self.path or self.path == "/":
            body: Any = {"access_token": "of-the-machine", "expires_in": 3600, "token_type": "Bearer"}
            if "project-id" in self.path:
                body = "project-of-the-machine"
            elif "token" not in self.path:
                body = {"email": "a@b", "scopes": ["x"], "aliases": []} if "recursive" in self.path else "ok"
        elif self.headers["Authorization"] != "Bearer of-the-machine":
            return self.send_error(403)
        elif self.path == "/v1/projects/p/secrets/nvembed-hf/versions/latest:access":
            body = {"payload": {"data": base64.b64encode(TOKEN.encode()).decode()}}
        else:
            return self.send_error(404)
        text = body if isinstance(body, str) else json.dumps(body)
        self.send_response(200)
        self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Type", "application/text" if isinstance(body, str) else "application/json")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: Any) -> None:
        pass


def test_google_gives_a_machine_what_its_account_may_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = cloud(
        {"type": "gcp", "project": "p", "region": "r", "zone": "z"}, secrets={"NV_TOKEN": {"secret": "nvembed-hf"}}
    )
    where = node_secrets.reference(target, target.secrets["NV_TOKEN"])
    assert where == "gcp-secret:p:nvembed-hf/versions/latest"
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no credentials of the user who runs the tests
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Google) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("GCE_METADATA_HOST", "GCE_METADATA_IP"):
            monkeypatch.setenv(name, f"127.0.0.1:{server.server_port}")
        monkeypatch.setattr(node_secrets, "GCP_ADDRESS", f"http://127.0.0.1:{server.server_port}/v1")
        assert node_secrets.fetch(where) == TOKEN
        assert node_secrets.main([f"NV_X={where.replace('hf', 'none')}", "--", "/bin/false"]) == 3
        server.shutdown()
    shown = capsys.readouterr().err
    assert "answers 404" in shown and "secretmanager.versions.access" in shown


def test_only_model_folders_are_copied_to_machines(tmp_path: Path) -> None:
    from nvembed.jobs.cloud.backend import check_models, render_cluster

    folder = tmp_path / "base"
    target = cloud({"type": "aws", "region": "r"}, models={"/home/ray/models/base": str(folder)})
    with pytest.raises(UserError, match=r"/home/ray/models/base: .*/base is not a model folder"):
        check_models(target)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    check_models(target)
    assert render_cluster(target, "/t")["file_mounts"]["/home/ray/models/base"] == str(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"holds pytorch_model.bin; only safetensors are loaded"):
        check_models(target)
