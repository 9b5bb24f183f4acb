"""Sources, artifacts and ways back on a real S3 server (moto, on loopback), and what happens when it answers 5xx.

pip install 'nvembed[s3test]'
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nvembed.core import retry, storage
from nvembed.core.steps import CorruptArtifactError, load_artifact
from nvembed.data.config import BeirSource, FilesSource, PrepareConfig
from nvembed.data.prepare import PREPARE
from nvembed.data.sources.base import SourceRows
from nvembed.data.sources.beir import read_beir
from nvembed.data.sources.files import read_files
from nvembed.data.tables import dataset_info
from nvembed.data.writers import write_beir, write_flag_embedding, write_rows
from nvembed.types import Artifact

ROWS = [{"query": f"question {i}", "pos": [f"answer {i}"], "neg": [f"wrong {i}"]} for i in range(120)]


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
def test_files_on_s3(store: Any, ending: str) -> None:
    put_rows("s3://bucket/in/part-0.jsonl")
    first = read_files(source("s3://bucket/in/*.jsonl"))
    assert content(first) == EXPECTED == content(read_files(source("s3://bucket/in")))
    everything = [row for examples in first.examples.values() for row in examples]
    write_flag_embedding(first.documents, everything, f"s3://bucket/out/rows.{ending}")
    assert content(read_files(source(f"s3://bucket/out/rows.{ending}"))) == EXPECTED
    write_beir(first.documents, first.examples, "s3://bucket/beir")
    folder = read_beir(BeirSource(name="mine", instruction="web_search", uri="s3://bucket/beir"))
    assert {key: len(rows) for key, rows in folder.examples.items()} == {k: len(v) for k, v in first.examples.items()}


def test_an_object_appears_whole_or_not_at_all(store: Any) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"anchor": "a" * (6 << 20), "positive": "b"}  # more than the first part of an upload
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write_rows(rows(), "s3://bucket/rows.jsonl")
    assert not storage.exists("s3://bucket/rows.jsonl")


def prepare(out: str) -> Artifact:
    return PREPARE.run(PrepareConfig(sources=(source("s3://bucket/rows.jsonl"),)), {}, out)


def test_prepare_on_s3_gives_the_bytes_of_prepare_on_a_disk(store: Any, tmp_path: Path) -> None:
    put_rows("s3://bucket/rows.jsonl")
    here, there = prepare(str(tmp_path / "out")), prepare("s3://bucket/out")
    assert there.manifest["files"] == here.manifest["files"]
    assert there.manifest_hash == here.manifest_hash
    assert load_artifact("s3://bucket/out").manifest_hash == here.manifest_hash
    assert storage.list_directory("s3://bucket/out") == ["manifest.json", "mine"]


@pytest.mark.parametrize(
    "answer", ["503 Service Unavailable", pytest.param("500 Internal Server Error", marks=pytest.mark.slow)]
)
def test_answers_of_5xx_are_tried_again(store: Any, answer: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every fifth request of each kind is refused; the result is that of a store in health."""
    put_rows("s3://bucket/rows.jsonl")
    healthy = prepare("s3://bucket/healthy")
    requested: Counter[str] = Counter()

    def refuse(method: str, path: str) -> bool:
        requested[method] += 1
        return requested[method] % 5 == 0

    store.answer, store.refuse = answer, refuse
    with caplog.at_level("WARNING", "nvembed.core.retry"):
        artifact = prepare("s3://bucket/out")
    store.refuse = lambda method, path: False
    assert store.refused.total() > 15 and store.refused["PUT"] > 0 and store.refused["GET"] > 0
    assert "trying again" in caplog.text
    assert artifact.manifest["files"] == healthy.manifest["files"]
    assert dataset_info(artifact) == dataset_info(healthy)


def test_answers_that_end_early_are_asked_for_again(
    store: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third object comes with half of its body and the length of the whole; s3fs' own five tries are off."""
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    put_rows("s3://bucket/rows.jsonl")
    healthy = prepare("s3://bucket/healthy")
    requested: Counter[str] = Counter()

    def cut(method: str, path: str) -> bool:
        requested[method] += method == "GET" and "." in path.rsplit("/", 1)[-1]
        return method == "GET" and "." in path.rsplit("/", 1)[-1] and requested[method] % 3 == 0

    store.cut = cut
    with caplog.at_level("WARNING", "nvembed.core.retry"):
        artifact = prepare("s3://bucket/out")
        tables = [storage.read_bytes(artifact.path(name)) for name in artifact.manifest["files"]]
    store.cut = lambda method, path: False
    assert store.refused["cut"] > 2 and "trying again" in caplog.text
    assert artifact.manifest["files"] == healthy.manifest["files"]
    assert tables == [storage.read_bytes(healthy.path(name)) for name in healthy.manifest["files"]]


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [1, 3, 6])
def test_a_store_that_stays_away_stops_the_run_with_nothing_published(store: Any, allowed: int) -> None:
    """Writing stops working after some objects; the step ends with the store's error, and the next run mends it."""
    put_rows("s3://bucket/rows.jsonl")
    written = iter(range(10**9))
    store.refuse = lambda method, path: method in ("PUT", "POST") and next(written) >= allowed
    with pytest.raises(OSError, match="try later"):
        prepare("s3://bucket/out")
    assert store.refused.total() >= retry.ATTEMPTS
    store.refuse = lambda method, path: False
    assert not storage.exists("s3://bucket/out/manifest.json")
    with pytest.raises(CorruptArtifactError, match="not a published artifact"):
        load_artifact("s3://bucket/out")
    mended = prepare("s3://bucket/out")
    assert mended.manifest["files"] == prepare("s3://bucket/clean").manifest["files"]
    assert load_artifact("s3://bucket/out").manifest_hash == mended.manifest_hash
