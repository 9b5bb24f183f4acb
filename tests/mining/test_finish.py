"""The cap over arrays keeps what the plain reading of rows keeps; a joined file's bytes depend on its rows alone."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.core.vectors import write_shard
from nvembed.mining.audit import Audit
from nvembed.mining.config import MineConfig
from nvembed.mining.finish import MINED_SCHEMA, capped_negatives, capped_tables, join_groups
from nvembed.mining.layout import MinePaths

IDS = [f"d{number}" for number in range(8)]
SCORES = [0.1, 0.2, 0.5, 0.5, 0.9]


def plain(rows, count, cap):
    """Deferred acceptance, one request at a time; given negatives first and untouched."""
    left = {place: [item for item in row["negatives"] if item["score"] is not None] for place, row in enumerate(rows)}
    holds = {key: [] for key in IDS}  # (score, example, place of the query)
    chosen = {place: [] for place in left}
    while asking := [place for place in left if left[place] and len(chosen[place]) < count]:
        item = left[asking[0]].pop(0)
        chosen[asking[0]].append(item)
        holds[item["id"]].append((-item["score"], rows[asking[0]]["example_id"], asking[0], item))
        holds[item["id"]].sort(key=lambda request: request[:2])
        if len(holds[item["id"]]) > cap:
            *_, loser, lost = holds[item["id"]].pop()
            chosen[loser].remove(lost)
    out = []
    for place, row in enumerate(rows):
        ranked = [item for item in row["negatives"] if item["score"] is not None and item in chosen[place]]
        out.append(([item for item in row["negatives"] if item["score"] is None] + ranked)[:count])
    return out


@st.composite
def sets(draw):
    names = draw(st.permutations([f"e{number}" for number in range(draw(st.integers(1, 9)))]))
    rows = []
    for name in names:
        ids = draw(st.lists(st.sampled_from(IDS), max_size=7, unique=True))
        scores = sorted((draw(st.sampled_from(SCORES)) for _ in ids), reverse=True)
        given_ids = draw(st.lists(st.sampled_from(["g1", "g2", "g3"]), max_size=3, unique=True))
        negatives = [{"id": key, "score": None} for key in given_ids]
        negatives += [{"id": key, "score": score} for key, score in zip(ids, scores, strict=True)]
        rows.append({"example_id": name, "positives": [], "negatives": negatives, "known_positives": []})
    return rows, draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finish")


@given(sets())
@settings(deadline=None, max_examples=150)
def test_the_cap_keeps_what_a_plain_loop_keeps(folder, drawn):
    rows, count, cap, size = drawn
    uris = []
    for start in range(0, len(rows), size):
        uris.append(str(folder / f"part-{start}.parquet"))
        write_shard(pa.Table.from_pylist(rows[start : start + size], schema=MINED_SCHEMA), uris[-1])
    stays = capped_negatives(uris, MineConfig(num_negatives=count, max_per_document=cap))
    for _ in range(2):  # a second try at writing gets the same
        joined = [row for table in capped_tables(uris, stays) for row in table.to_pylist()]
        expected = [{**row, "negatives": chosen} for row, chosen in zip(rows, plain(rows, count, cap), strict=True)]
        assert joined == expected


def test_a_joined_file_depends_on_its_rows_alone(tmp_path):
    """Also where it has several row groups, and wherever the parts end."""
    rows = [
        {"example_id": f"e{n:05d}", "positives": [], "negatives": [{"id": f"d{n % 97}", "score": n / 7}],
         "known_positives": []}
        for n in range(20_000)
    ]  # fmt: skip
    table, written = pa.Table.from_pylist(rows, schema=MINED_SCHEMA), []
    for name, size in (("whole", 20_000), ("cut", 3_001), ("small", 1_100)):
        paths = MinePaths.under(str(tmp_path / name))
        parts = [f"part-{start:05d}" for start in range(0, 20_000, size)]
        for part, start in zip(parts, range(0, 20_000, size), strict=True):
            write_shard(table.slice(start, size), f"{paths.select}/set/{part}.parquet")
        assert join_groups(MineConfig(), paths, "set", parts, str(tmp_path / name), Audit()) == 20_000
        written.append(Path(tmp_path / name / "set/mined.parquet").read_bytes())
    assert written[0] == written[1] == written[2]
