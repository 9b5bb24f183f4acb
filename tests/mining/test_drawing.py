"""Random negatives of a group, looked up together, are those that each example draws alone from the whole corpus."""

from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvembed.core.vectors import write_table
from nvembed.mining import search
from nvembed.mining.config import MineConfig, RandomNegatives
from nvembed.mining.drawing import random_choices
from nvembed.mining.search import MinePaths, Searcher
from nvembed.mining.selection import draw_accepted, example_generator, select_negatives


def alone(config, row, documents):
    """One example's draws in plain Python, from all documents in the order of their ids."""
    ids, by_id = sorted(documents), documents
    never = {row["hash"], *(by_id[key] for key in row["never"] if key in by_id)}

    def accept(order):
        keys = [ids[place] for place in order]
        picked = select_negatives(
            keys,
            [0.0] * len(keys),
            [by_id[key] for key in keys],
            below=float("inf"),
            never_ids=set(row["never"]),
            never_hashes=never,
            count=config.num_negatives,
        )
        return [order[place] for place in picked.kept]

    drawn = draw_accepted(example_generator(config.seed, "set", row["key"]), len(ids), config.num_negatives, accept)
    return [ids[place] for place in drawn]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drawing")


@given(
    hashes=st.lists(st.integers(0, 30), max_size=120),
    never=st.lists(st.lists(st.integers(0, 130), max_size=4), min_size=1, max_size=6),
    wanted=st.integers(1, 9),
    seed=st.integers(0, 3),
    at_once=st.sampled_from([1, 7, 1000]),
)
@settings(deadline=None)
def test_a_group_draws_what_each_example_draws_alone(folder, hashes, never, wanted, seed, at_once):
    documents = {f"d{number:03}": digest for number, digest in enumerate(hashes)}
    config = MineConfig(rule=RandomNegatives(), num_negatives=wanted, seed=seed)
    searcher = Searcher(config, MinePaths.under(str(folder)))
    texts = folder / "checkpoints/texts/set/documents"
    for old in texts.glob("part-*"):
        old.unlink()
    ids = sorted(documents)
    for number, start in enumerate(range(0, len(ids), 11)):
        keys = ids[start : start + 11]
        table = pa.table({"key": keys, "hash": pa.array([documents[key] for key in keys], pa.int64())})
        write_table(table, str(texts / f"part-{number:05}.parquet"))
    rows = [
        {"key": f"q{number}", "hash": number, "never": [f"d{place:03}" for place in places]}
        for number, places in enumerate(never)
    ]
    with mock.patch.object(search, "_HASHES_AT_ONCE", at_once):
        found = random_choices(searcher, {"dataset": "set", "corpus": len(ids)}, rows)
    assert found == [alone(config, row, documents) for row in rows]
