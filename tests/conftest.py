"""Fixtures shared by all tests; environment that must be set before ray, torch or mlflow are imported."""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A busy machine makes single examples slow; what hangs is stopped by the timeout every test has.
settings.register_profile("nvembed", deadline=None)
settings.load_profile("nvembed")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest -n 2` (pytest-xdist) keeps a file's tests together, as they share fixtures, and files in our order."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False


# The longest files, in minutes: started last, they would leave all workers but one idle at the end.
LONGEST = (
    "pipelines/test_tiny.py", "training/test_equality.py", "training/test_resume.py", "training/test_launch.py",
    "evaluation/test_run.py", "retrieval/test_encode.py", "stream/test_steps.py", "mining/test_step.py",
    "pipeline/test_run.py", "distill/test_teacher_embeddings.py", "data/test_prepare.py", "mining/test_rejected.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first, where several processes share the files."""
    if getattr(config.option, "dist", "no") != "no" or os.environ.get("PYTEST_XDIST_WORKER"):
        place = {name: number for number, name in enumerate(LONGEST)}
        tests = Path(__file__).parent
        items.sort(key=lambda item: place.get(item.path.relative_to(tests).as_posix(), len(place)))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray cluster for all tests that need one (a start costs about 5 s)."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


class S3Front:
    """Stands before the S3 server and answers some requests itself, with 503 or 500, or sends half of the answer."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._lock = threading.Lock()
        self.refuse: Callable[[str, str], bool] = lambda method, path: False
        self.answer = "503 Service Unavailable"
        self.cut: Callable[[str, str], bool] = lambda method, path: False
        self.refused: Counter[str] = Counter()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            refuse = self.refuse(environ["REQUEST_METHOD"], environ["PATH_INFO"])
            self.refused[environ["REQUEST_METHOD"]] += refuse
            cut = not refuse and self.cut(environ["REQUEST_METHOD"], environ["PATH_INFO"])
            self.refused["cut"] += cut
        if cut:  # the headers promise the whole body
            body = b"".join(self._app(environ, start_response))
            return [body[: len(body) // 2]]
        if not refuse:
            return self._app(environ, start_response)  # type: ignore[no-any-return]
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        code = "ServiceUnavailable" if self.answer.startswith("503") else "InternalError"
        start_response(self.answer, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>try later</Message></Error>".encode()]


@pytest.fixture(scope="session")
def s3_front() -> Iterator[tuple[S3Front, int]]:
    pytest.importorskip("moto", reason="the S3 server of this test: pip install 'nvembed[s3test]'")
    pytest.importorskip("s3fs", reason="s3:// needs s3fs: pip install 'nvembed[s3]'")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    found = S3Front(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, found, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found, server.server_port
    server.shutdown()
    thread.join()


@pytest.fixture
def store(s3_front: tuple[S3Front, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Front]:
    """An empty bucket `s3://bucket`; retries of the client below are off, ours wait less."""
    import s3fs

    from nvembed.core import retry

    found, port = s3_front
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.05)
    found.refuse = found.cut = lambda method, path: False
    found.answer, found.refused = "503 Service Unavailable", Counter()
    s3fs.S3FileSystem.clear_instance_cache()
    client = s3fs.S3FileSystem()
    if client.exists("bucket"):
        client.rm("bucket", recursive=True)
    client.mkdir("bucket")
    yield found
    s3fs.S3FileSystem.clear_instance_cache()


def _mount(*arguments: str) -> bool:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True, timeout=20, check=False).returncode == 0
    except OSError:
        return False


class SmallDisk:
    """A file system of its own, a tmpfs, that can be full."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def resize(self, size: str) -> None:
        """Give it another size, as mount takes it (48k, 64m)."""
        assert _mount("-o", f"remount,size={size}", str(self.place))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """One of 1 MiB. Skips where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    if not _mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)):
        pytest.skip("mounting a tmpfs is not allowed here")
    yield SmallDisk(place)
    subprocess.run(["umount", "-l", str(place)], capture_output=True, timeout=20, check=False)
