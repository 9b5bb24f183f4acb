"""Sources, artifacts and ways back on a real S3 server (moto, on loopback), and what happens when it answers 5xx.

pip install 'nvembed[s3test]'
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nvembed import retry, storage
from nvembed.data.config import BeirSource, FilesSource, PrepareConfig
from nvembed.data.export import write_beir, write_flag_embedding, write_rows
from nvembed.data.prepare import PREPARE
from nvembed.data.sources.base import SourceRows
from nvembed.data.sources.beir import read_beir
from nvembed.data.sources.files import read_files
from nvembed.data.tables import dataset_info
from nvembed.types import Artifact

pytest.importorskip("moto", reason="the S3 server of this test: pip install 'nvembed[s3test]'")
pytest.importorskip("s3fs", reason="s3:// needs s3fs: pip install 'nvembed[s3]'")

ROWS = [{"query": f"question {i}", "pos": [f"answer {i}"], "neg": [f"wrong {i}"]} for i in range(120)]


class Front:
    """Stands before the S3 server and answers some requests itself, with 503 or 500."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._lock = threading.Lock()
        self.refuse: Callable[[str, str], bool] = lambda method, path: False
        self.answer = "503 Service Unavailable"
        self.refused: Counter[str] = Counter()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            refuse = self.refuse(environ["REQUEST_METHOD"], environ["PATH_INFO"])
            self.refused[environ["REQUEST_METHOD"]] += refuse
        if not refuse:
            return self._app(environ, start_response)  # type: ignore[no-any-return]
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        code = "ServiceUnavailable" if self.answer.startswith("503") else "InternalError"
        start_response(self.answer, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{code}</Code><Message>try later</Message></Error>".encode()]


@pytest.fixture(scope="module")
def front() -> Iterator[tuple[Front, int]]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    found = Front(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, found, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found, server.server_port
    server.shutdown()
    thread.join()


@pytest.fixture
def store(front: tuple[Front, int], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Front]:
    """An empty bucket `s3://bucket`; retries of the client below are off, ours wait less."""
    import s3fs

    found, port = front
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(retry, "LONGEST_WAIT", 0.05)
    found.refuse, found.answer, found.refused = (lambda method, path: False), "503 Service Unavailable", Counter()
    s3fs.S3FileSystem.clear_instance_cache()
    client = s3fs.S3FileSystem()
    if client.exists("bucket"):
        client.rm("bucket", recursive=True)
    client.mkdir("bucket")
    yield found
    s3fs.S3FileSystem.clear_instance_cache()


def source(uri: str) -> FilesSource:
    return FilesSource(name="mine", instruction="web_search", uris=(uri,))


def content(rows: SourceRows) -> set[tuple[Any, ...]]:
    texts = {row.id: row.text for row in rows.documents}
    return {
        (row.query, *(tuple(texts[item.id] for item in items) for items in (row.positives, row.negatives)))
        for examples in rows.examples.values()
        for row in examples
    }


EXPECTED = {(row["query"], tuple(row["pos"]), tuple(row["neg"])) for row in ROWS}


def put_rows(uri: str) -> None:
    storage.write_bytes(uri, "".join(json.dumps(row) + "\n" for row in ROWS).encode())


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_files_on_s3(store: Front, ending: str) -> None:
    put_rows("s3://bucket/in/part-0.jsonl")
    first = read_files(source("s3://bucket/in/*.jsonl"))
    assert content(first) == EXPECTED == content(read_files(source("s3://bucket/in")))
    everything = [row for examples in first.examples.values() for row in examples]
    write_flag_embedding(first.documents, everything, f"s3://bucket/out/rows.{ending}")
    assert content(read_files(source(f"s3://bucket/out/rows.{ending}"))) == EXPECTED
    write_beir(first.documents, first.examples, "s3://bucket/beir")
    folder = read_beir(BeirSource(name="mine", instruction="web_search", uri="s3://bucket/beir"))
    assert {key: len(rows) for key, rows in folder.examples.items()} == {k: len(v) for k, v in first.examples.items()}


def test_an_object_appears_whole_or_not_at_all(store: Front) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"anchor": "a" * (6 << 20), "positive": "b"}  # more than the first part of an upload
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write_rows(rows(), "s3://bucket/rows.jsonl")
    assert not storage.exists("s3://bucket/rows.jsonl")


def prepare(out: str) -> Artifact:
    return PREPARE.run(PrepareConfig(sources=(source("s3://bucket/rows.jsonl"),)), {}, out)


def test_prepare_on_s3_gives_the_bytes_of_prepare_on_a_disk(store: Front, tmp_path: Path) -> None:
    put_rows("s3://bucket/rows.jsonl")
    here, there = prepare(str(tmp_path / "out")), prepare("s3://bucket/out")
    assert there.manifest["files"] == here.manifest["files"]
    assert there.manifest_hash == here.manifest_hash
    assert storage.load_artifact("s3://bucket/out").manifest_hash == here.manifest_hash
    assert storage.list_directory("s3://bucket/out") == ["manifest.json", "mine"]


@pytest.mark.parametrize(
    "answer", ["503 Service Unavailable", pytest.param("500 Internal Server Error", marks=pytest.mark.slow)]
)
def test_answers_of_5xx_are_tried_again(store: Front, answer: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every fifth request of each kind is refused; the result is that of a store in health."""
    put_rows("s3://bucket/rows.jsonl")
    healthy = prepare("s3://bucket/healthy")
    asked: Counter[str] = Counter()

    def refuse(method: str, path: str) -> bool:
        asked[method] += 1
        return asked[method] % 5 == 0

    store.answer, store.refuse = answer, refuse
    with caplog.at_level("WARNING", "nvembed.retry"):
        artifact = prepare("s3://bucket/out")
    store.refuse = lambda method, path: False
    assert store.refused.total() > 15 and store.refused["PUT"] > 0 and store.refused["GET"] > 0
    assert "trying again" in caplog.text
    assert artifact.manifest["files"] == healthy.manifest["files"]
    assert dataset_info(artifact) == dataset_info(healthy)


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [1, 3, 6])
def test_a_store_that_stays_away_stops_the_run_with_nothing_published(store: Front, allowed: int) -> None:
    """Writing stops working after some objects; the step ends with the store's error, and the next run mends it."""
    put_rows("s3://bucket/rows.jsonl")
    written = iter(range(10**9))
    store.refuse = lambda method, path: method in ("PUT", "POST") and next(written) >= allowed
    with pytest.raises(OSError, match="try later"):
        prepare("s3://bucket/out")
    assert store.refused.total() >= retry.ATTEMPTS
    store.refuse = lambda method, path: False
    assert not storage.exists("s3://bucket/out/manifest.json")
    with pytest.raises(storage.CorruptArtifactError, match="not a published artifact"):
        storage.load_artifact("s3://bucket/out")
    mended = prepare("s3://bucket/out")
    assert mended.manifest["files"] == prepare("s3://bucket/clean").manifest["files"]
    assert storage.load_artifact("s3://bucket/out").manifest_hash == mended.manifest_hash
