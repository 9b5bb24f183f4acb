"""The tiny recipe with its output on object storage: a real S3 server (moto) on loopback, s3fs, nothing local.

About 3 minutes on 2 idle cores. Tracking and registry are off: their SQLite store needs a disk or a server.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvembed.core import storage
from nvembed.core.steps import load_artifact

# an extra of its own: in the extra `test` pip takes very long to fit its pins to the rest
pytest.importorskip("moto", reason="the S3 server of this test: pip install 'nvembed[s3test]'")
pytest.importorskip("s3fs", reason="s3:// needs s3fs: pip install 'nvembed[s3]'")

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "tracking.enabled=false", "register.enabled=false", "stage_1.stream.steps=6", "stage_2=null",
    "student.stream.steps=2",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket; the environment says where it is and how to get in."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    client = s3fs.S3FileSystem()
    if client.exists("bucket"):  # the server's store is the process'; another test may have used it
        client.rm("bucket", recursive=True)
    client.mkdir("bucket")
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.timeout(1800)
def test_a_run_on_object_storage(bucket: str, tmp_path: Path) -> None:
    out = f"{bucket}/run"
    command = [sys.executable, str(ROOT / "pipelines/quickstart.py"), str(ROOT / "pipelines/recipes/tiny.yaml")]
    command += ["--out", out, *(part for setting in SETTINGS for part in ("--set", setting))]
    variables = {**os.environ, "NVEMBED_CACHE": str(tmp_path / "cache")}
    for again in (False, True):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables, cwd=tmp_path,
            timeout=1500,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        assert again == ("train_student: skipped, unchanged" in done.stdout)
    rows = [json.loads(line) for line in storage.read_bytes(f"{out}/train_stage_1/metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    names = storage.list_directory(out)
    assert {"report.json", "report.html", "recipe.yaml", "train_student"} <= set(names)
    assert not any(name.startswith(".preflight") for name in names)
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}, "nothing but fetched models lies on the disk"
    for step in ("prepare", "mine", "train_stage_1", "evaluate_student", "compare_student"):
        load_artifact(f"{out}/{step}")
