"""Encoding in actors: both work, order and bytes as in one process, a restart encodes only what is missing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nvembed.core.parquet import list_shards, read_table
from nvembed.core.vectors import read_vectors, table_matrix, write_shard, write_text_shards
from nvembed.retrieval.config import EncodeConfig, PackageModel
from nvembed.retrieval.encode import Encoding, encode_each, encode_shards
from nvembed.retrieval.encoders import open_encoder
from nvembed.retrieval.rows import encode_checked

pytestmark = pytest.mark.ray

CONFIG = EncodeConfig(actors=2, shard_rows=10, precision="fp32")


def text_rows(count):
    return [(f"k{index:03d}", f"text number {index} " + "word " * (index % 17), "") for index in range(count)]


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(Path(root).rglob("*.parquet"))}


def test_two_actors_order_bytes_restart_and_cache(tmp_path, ray_session):
    source, out = str(tmp_path / "texts"), str(tmp_path / "vectors")
    config = CONFIG.model_copy(update={"cache": str(tmp_path / "cache")})
    for name, rows in (("b", text_rows(33)), ("a/inner", text_rows(60)[33:])):
        write_text_shards(rows, f"{source}/{name}", CONFIG.shard_rows)
    report = encode_shards(source, PackageModel(), out, config)
    assert (report.rows, report.reused_rows, report.embedded, report.cached) == (60, 0, 60, 0)
    assert len(report.workers) == 2 and sum(report.workers.values()) == 60 and min(report.workers.values()) > 0
    assert list_shards(out) == list_shards(source)

    encoder = open_encoder(PackageModel(), 1, "fp32", token_budget=CONFIG.token_budget)
    for name in list_shards(source):
        texts, found = read_table(f"{source}/{name}"), read_table(f"{out}/{name}")
        assert found.column("key").to_pylist() == texts.column("key").to_pylist()
        columns = [texts.column(column).to_pylist() for column in ("text", "instruction")]
        assert table_matrix(found).tobytes() == encode_checked(encoder, *columns).matrix_AD.tobytes()
    keys, matrix = read_vectors(f"{out}/b")
    assert keys == [key for key, _, _ in text_rows(33)] and matrix.dtype == np.float32

    first = contents(out)
    names = list(first)
    changed, lost, cut = names[0], names[1], names[2]
    (Path(out) / lost).unlink()
    (Path(out) / cut).write_bytes(first[cut][:100])
    (Path(out) / "b" / "part-00099.parquet").write_bytes(first[lost])  # left by an earlier, longer input
    table = read_table(f"{source}/{changed}")
    write_shard(
        table.set_column(1, "text", [[text + " new" for text in table.column("text").to_pylist()]]),
        f"{source}/{changed}",
    )
    stamps = {name: (Path(out) / name).stat().st_mtime_ns for name in names[3:]}
    one = config.model_copy(update={"actors": 1})  # how many actors there are changes nothing
    again = encode_shards(source, PackageModel(), out, one)
    redone = sum(read_table(f"{source}/{name}").num_rows for name in (changed, lost, cut))
    assert (again.rows, again.reused_rows) == (redone, 60 - redone)
    assert again.embedded == table.num_rows and again.cached == redone - table.num_rows  # only what is new
    second = contents(out)
    assert second.pop(changed) != first.pop(changed)
    assert second == first
    assert {name: (Path(out) / name).stat().st_mtime_ns for name in names[3:]} == stamps

    assert encode_shards(source, PackageModel(), out, config).rows == 0
    anew = encode_shards(source, PackageModel(), f"{out}-2", config)
    assert (anew.rows, anew.embedded, anew.cached, anew.damaged) == (60, 0, 60, [])
    assert contents(f"{out}-2") == contents(out)


def test_several_encodings_share_a_pool(tmp_path, ray_session):
    plain, prompted = PackageModel(), PackageModel(instruction=True)
    sources = [str(tmp_path / "texts"), str(tmp_path / "more")]
    rows = [(key, text, "find: ") for key, text, _ in text_rows(25)]
    write_text_shards(rows, sources[0], CONFIG.shard_rows)
    write_text_shards([("empty", "", ""), *rows[5:]], f"{sources[1]}/documents", CONFIG.shard_rows)
    encodings = [
        Encoding(sources[0], plain, str(tmp_path / "0")),
        Encoding(sources[0], prompted, str(tmp_path / "1")),
        Encoding(sources[1], plain, str(tmp_path / "2"), ("documents",)),
    ]
    reports = encode_each(encodings, CONFIG)
    assert [(report.rows, report.rejected) for report in reports] == [(25, {}), (25, {}), (21, {"is empty": 1})]
    for encoding in encodings:
        encoder = open_encoder(encoding.model, 1, "fp32", token_budget=CONFIG.token_budget)
        for name in list_shards(encoding.source_uri):
            texts, found = read_table(f"{encoding.source_uri}/{name}"), read_table(f"{encoding.out_uri}/{name}")
            alone = encode_checked(encoder, texts.column("text").to_pylist(), texts.column("instruction").to_pylist())
            assert table_matrix(found).tobytes() == alone.matrix_AD.tobytes()
    before = contents(tmp_path)
    lost = read_table(str(tmp_path / "1/part-00001.parquet")).num_rows
    (tmp_path / "1/part-00001.parquet").unlink()
    again = encode_each(encodings, CONFIG)  # the one actor opens the second model alone
    assert [(report.rows, report.reused_rows) for report in again] == [(0, 25), (lost, 25 - lost), (0, 21)]
    assert contents(tmp_path) == before


DRIVER = """
import sys
from nvembed.retrieval.config import EncodeConfig, PackageModel
from nvembed.retrieval.encode import encode_shards
report = encode_shards(sys.argv[1], PackageModel(), sys.argv[2], EncodeConfig(actors=2, shard_rows=10))
print("reused", report.reused_rows, "rows", report.rows)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_of_the_driver_then_the_same_bytes(tmp_path):
    source = str(tmp_path / "texts")
    long = [(key, text * 40, "") for key, text, _ in text_rows(400)]
    write_text_shards(long, source, 10)

    def start(out):
        return subprocess.Popen([sys.executable, "-c", DRIVER, source, str(out)], stdout=subprocess.PIPE, text=True)

    clean, killed = tmp_path / "clean", tmp_path / "killed"
    done = start(clean)
    assert done.communicate(timeout=280)[0].split() == ["reused", "0", "rows", "400"]
    process = start(killed)
    deadline = time.monotonic() + 200
    while not len(list_shards(str(killed))) >= 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list_shards(str(killed))) < 40
    second = start(killed)
    words = second.communicate(timeout=280)[0].split()
    assert int(words[1]) >= 20 and int(words[1]) + int(words[3]) == 400
    assert contents(killed) == contents(clean)
