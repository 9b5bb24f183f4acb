"""Parts of a corpus that were searched apart merge into the search of the whole."""

import numpy as np
import pyarrow as pa
import pytest

from nvembed.mining.lists import PART_SCHEMA, merge_parts, search_table
from nvembed.retrieval.exact.search import search_shards


def with_hashes(result, known):
    """A part as it is stored: with text hashes of the candidates, and of those of `known` that the part holds."""
    table = search_table(result)
    for name in ("plain", "under"):
        hashes = [[digest(item["id"]) for item in items] for items in table.column(name).to_pylist()]
        table = table.append_column(f"{name}_hashes", pa.array(hashes, pa.list_(pa.int64())))
    never = [[digest(key) for key in known]] * table.num_rows
    return table.append_column("never_hashes", pa.array(never, pa.list_(pa.int64()))).cast(PART_SCHEMA)


def digest(key):
    return int(key[1:]) * 7919


@pytest.mark.parametrize("depth", [1, 7, 50])
def test_parts_of_the_corpus_merge_into_what_one_search_finds(depth):
    generator = np.random.default_rng(0)
    documents = generator.integers(-2, 3, (120, 5)).astype(np.float32)  # many ties
    query = generator.integers(-2, 3, (6, 5)).astype(np.float32)
    ids = np.array([f"d{number:03d}" for number in generator.permutation(120)], dtype=object)
    ceiling_Q = np.array([3.0, 2, 1, 0, -1, np.inf])
    options = {"plain": depth, "under": depth, "ceiling_Q": ceiling_Q, "count_above": True}
    whole = with_hashes(search_shards(query, [(ids, documents)], **options), ["d001", "d002"])
    for parts in (1, 3, 8, 60):
        cut = np.array_split(generator.permutation(120), parts)
        tables = (
            with_hashes(
                search_shards(query, [(ids[part], documents[part])], **options), {"d001", "d002"} & set(ids[part])
            )
            for part in cut
        )
        merged = merge_parts(tables, depth)
        assert merged.drop(["never_hashes"]).equals(whole.drop(["never_hashes"]))
        assert [sorted(row) for row in merged.column("never_hashes").to_pylist()] == [[7919, 2 * 7919]] * 6
