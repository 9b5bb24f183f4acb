"""Models once per node: processes race for one, one is killed half-way, the server counts what it sends."""

from __future__ import annotations

import functools
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nvembed.core import storage
from nvembed.core.model_cache import local_model, written_folder
from nvembed.types import UserError

WEIGHTS = b"w" * (1 << 20)
FETCH = "import sys; from nvembed.core.model_cache import local_model; print(local_model(*sys.argv[1:]))"


class Server:
    """A folder behind real HTTP, with a count of bodies sent per path and a brake on the weights."""

    def __init__(self, folder: Path) -> None:
        self.sent: Counter[str] = Counter()
        self.brake = threading.Event()
        self.reached = threading.Event()
        self.brake.set()
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.sent[self.path.rsplit("/", 1)[-1]] += 1
                if self.path.endswith(".safetensors"):
                    outer.reached.set()
                    outer.brake.wait(60)
                super().do_GET()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
        )
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.uri = f"http://127.0.0.1:{self._server.server_port}/model"

    def close(self) -> None:
        self.brake.set()
        self._server.shutdown()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served/model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    (folder / "1_Pooling/config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    made = Server(tmp_path / "served")
    yield made
    made.close()


def fetching(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "NVEMBED_CACHE": str(tmp_path / "cache"), **variables}
    command = [sys.executable, "-c", FETCH, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> Path:
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return Path(said.strip().splitlines()[-1])


def test_racing_processes_fetch_once(server: Server, tmp_path: Path) -> None:
    folders = {ended(process) for process in [fetching(tmp_path, server.uri) for _ in range(4)]}
    assert len(folders) == 1 and server.sent["model.safetensors"] == 1
    folder = folders.pop()
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS and (folder / "1_Pooling/config.json").exists()
    assert not (folder / "pytorch_model.bin").exists() and server.sent["pytorch_model.bin"] == 0


def test_a_killed_download_blocks_no_other(server: Server, tmp_path: Path) -> None:
    server.brake.clear()
    first = fetching(tmp_path, server.uri)
    assert server.reached.wait(60)
    second = fetching(tmp_path, server.uri)
    time.sleep(0.5)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    server.brake.set()
    folder = ended(second)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert [path.name for path in (tmp_path / "cache/models").iterdir() if path.name.endswith(".part")] == []


def test_what_changed_is_fetched_again(server: Server, tmp_path: Path) -> None:
    before = ended(fetching(tmp_path, server.uri))
    (tmp_path / "served/model/model.safetensors").write_bytes(WEIGHTS + b"!")
    after = ended(fetching(tmp_path, server.uri))
    assert before != after and (after / "model.safetensors").read_bytes() == WEIGHTS + b"!"


def test_local_folders_stay_where_they_are(tmp_path: Path) -> None:
    assert local_model(str(tmp_path)) == tmp_path and local_model(f"file://{tmp_path}") == tmp_path


def test_a_missing_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"memory://nowhere.*empty or missing"):
        local_model("memory://nowhere/model")
    with pytest.raises(UserError, match=r"nobody/no-such-model.*Check name, revision and connection"):
        local_model("nobody/no-such-model", "main")


@pytest.mark.parametrize("name", ["../../outside.json", "/outside.json", "a\\..\\b.json", "a/./b.json", "a\nb.json"])
def test_a_listing_cannot_leave_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "a/b/cache"))
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr(f"1_Pooling/{name}" if not name.startswith("/") else name, "stolen")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="which is not a name below it"):
        local_model(f"zip://::{tmp_path}/model.zip")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_archive_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("m/config.json", "{}")
        archive.writestr("m/1_Pooling/config.json", "{}")
        archive.writestr("m/empty/", "")
    for uri in (f"zip://m::{tmp_path}/model.zip", f"zip://::{tmp_path}/model.zip"):
        folder = local_model(uri)
        assert [path.name for path in folder.rglob("*.json")] == ["config.json"] * 2


def test_a_folder_is_sent_to_a_remote_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVEMBED_CACHE", str(tmp_path / "cache"))
    uri = "memory://sent/model"
    storage.write_bytes(f"{uri}/left-by-a-kill", b"x")
    for text in ("one", "two"):
        with written_folder(uri) as folder:
            (folder / "sub").mkdir(parents=True)
            (folder / "sub/a.json").write_text(text)
        assert storage.list_directory(uri) == ["sub"] and storage.read_bytes(f"{uri}/sub/a.json") == text.encode()
        assert (local_model(uri) / "sub/a.json").read_text() == text


# -- the hub: huggingface_hub's own client against a server that speaks its protocol -------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "pytorch_model.bin": b"a pickle", "onnx/model.onnx": b"o"}


class Hub(Server):
    """The three addresses of the hub that a snapshot needs."""

    def __init__(self) -> None:
        import json

        self.sent = Counter()
        self.brake, self.reached = threading.Event(), threading.Event()
        self.brake.set()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(True)

            def do_HEAD(self) -> None:
                self.answer(False)

            def answer(self, body: bool) -> None:
                path = self.path.split("?")[0]
                if path.startswith("/api/models/some/model"):
                    outer.sent["api"] += 1
                    tree = "/tree/" in path
                    listed = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in FILES.items()]
                    info = {"id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": n} for n in FILES]}
                    return self.send(json.dumps(listed if tree else info).encode(), {}, body)
                name = path.partition(f"/resolve/{COMMIT}/")[2]
                if name not in FILES:
                    return self.send(b"", {}, body, 404)
                if body:
                    outer.sent[name] += 1
                    if name.endswith(".safetensors"):
                        outer.reached.set()
                        outer.brake.wait(60)
                self.send(FILES[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}, body)
                return None

            def send(self, data: bytes, headers: dict[str, str], body: bool, code: int = 200) -> None:
                self.send_response(code)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.uri = f"http://127.0.0.1:{self._server.server_port}"


@pytest.mark.slow
def test_ranks_share_one_snapshot_of_the_hub(tmp_path: Path) -> None:
    hub = Hub()
    try:
        variables = {"HF_ENDPOINT": hub.uri, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        variables |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        hub.brake.clear()
        killed = fetching(tmp_path, "some/model", COMMIT, **variables)
        assert hub.reached.wait(120), killed.communicate()
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        hub.brake.set()
        hub.sent.clear()
        folders = {ended(p) for p in [fetching(tmp_path, "some/model", COMMIT, **variables) for _ in range(4)]}
        folder = folders.pop()
        assert folders == set() and folder.name == COMMIT
        assert hub.sent["model.safetensors"] == 1 and hub.sent["pytorch_model.bin"] == hub.sent["onnx/model.onnx"] == 0
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        asked = hub.sent.total()
        assert ended(fetching(tmp_path, "some/model", COMMIT, **variables)) == folder
        assert hub.sent.total() == asked, "a commit that is here is not asked for again"
    finally:
        hub.close()
