"""The random rule: uniform draws from the corpus for a group of examples, the control of what mining buys."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pyarrow as pa

from nvembed.mining.search import Searcher
from nvembed.mining.selection import draw_rounds, example_generator, select_negatives

Rounds = Generator[list[int], list[str], list[str]]


def random_choices(searcher: Searcher, task: dict[str, Any], rows: list[dict[str, Any]]) -> list[list[str]]:
    """Ids of up to `num_negatives` documents for each example, known positives and repeated texts left out.

    Every example draws from a generator of its own, so the division into groups changes nothing. All of a group look
    their draws up together: memory depends on the draws, not on the corpus.

    Args:
        rows: the examples (`search.QUERY_COLUMNS`).
    """
    config, dataset = searcher.config, task["dataset"]
    never = _never_hashes(searcher, dataset, rows)
    kept: list[list[str]] = [[] for _ in rows]
    rounds: dict[int, Rounds] = {
        index: draw_rounds(example_generator(config.seed, dataset, row["key"]), task["corpus"], config.num_negatives)
        for index, row in enumerate(rows)
    }
    orders = {index: next(asking) for index, asking in rounds.items()}
    while orders:
        place_U = np.unique(np.concatenate([np.array(order, dtype=np.int64) for order in orders.values()]))
        ids, hash_U = searcher.documents_at(dataset, place_U)
        for index, order in list(orders.items()):
            at = np.searchsorted(place_U, order).tolist()
            picked = select_negatives(
                [ids[place] for place in at],
                [0.0] * len(at),
                hash_U[at].tolist(),
                below=np.inf,
                never_ids=set(rows[index]["never"]),
                never_hashes=never[index],
                count=config.num_negatives,
            )
            try:
                orders[index] = rounds[index].send([ids[at[place]] for place in picked.kept])
            except StopIteration as done:
                kept[index] = done.value
                del orders[index]
    return kept


def _never_hashes(searcher: Searcher, dataset: str, rows: list[dict[str, Any]]) -> list[set[int]]:
    """Text hashes of each example's query and of what must not be its negative."""
    never = sorted({key for row in rows for key in row["never"]})
    hash_N, found_N = searcher.hashes_of(dataset, pa.array(never, pa.string()))
    by_id = {key: int(digest) for key, digest, found in zip(never, hash_N, found_N, strict=True) if found}
    return [{row["hash"], *(by_id[key] for key in row["never"] if key in by_id)} for row in rows]
