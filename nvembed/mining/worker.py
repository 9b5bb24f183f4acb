"""The workers inside the mining actors: they search, and select from what was found.

Each group of queries ends as `<select>/<dataset>/part-*.parquet` (`part-*.searched` and the part's audit as
`part-*.json` beside it); a part that is there is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nvembed.core import storage
from nvembed.core.vectors import iter_parquet, read_slice, write_table
from nvembed.data.tables import SCORED_IDS
from nvembed.mining.audit import Audit
from nvembed.mining.blocks import Problem, members
from nvembed.mining.choosing import Choices, choices
from nvembed.mining.config import MineConfig
from nvembed.mining.drawing import random_choices
from nvembed.mining.lists import flat, one_array
from nvembed.mining.mined import MINED_SCHEMA, best_rank, mined_table, own_positives, placed
from nvembed.mining.rules import consistent
from nvembed.mining.search import MinePaths, Searcher
from nvembed.mining.searched import SEARCHED_SCHEMA
from nvembed.mining.selection import ClassExamples, example_based, example_generator
from nvembed.text.identity import text_hash
from nvembed.types import UserError

__all__ = ["MinePaths", "MineWorker", "selected"]


def selected(
    searcher: Searcher, task: dict[str, Any], queries: pa.Table, lanes: Sequence[pa.Table]
) -> tuple[pa.Table, Audit]:
    """Rows of `MINED_SCHEMA` for a group of queries by what the retrievers found, and the numbers of the selection.

    Args:
        queries: the group (`search.QUERY_COLUMNS`).
        lanes: each retriever's rows; see `choosing.choices`.

    Raises:
        NeedsSearchError: the rule asks about what an earlier step did not search.
    """
    config, audit, searched = searcher.config, Audit(), lanes[0]
    problem = Problem.read(queries, searched, config.depth)
    chosen = choices(searcher, task, queries, lanes, problem)
    own = own_positives(queries, searched.column("positives"))
    best_Q = _audit(audit, searcher, problem, searched.column("positives"), chosen, own)
    kept, rows = chosen.kept, queries
    if config.max_positive_rank is not None:
        good_Q = consistent(best_Q, config.max_positive_rank)
        audit.counts["inconsistent"] += int(np.count_nonzero(~good_Q))
        kept, own, rows = (each.filter(pa.array(good_Q)) for each in (kept, own, rows))
    capped = config.max_per_document is not None
    mined, given = mined_table(rows, own, kept, config.num_negatives, capped=capped)
    audit.counts["given"] += given
    if not capped:
        audit.add_examples(one_array(mined.column("negatives")), config.num_negatives)
    return mined, audit


def _audit(
    audit: Audit, searcher: Searcher, problem: Problem, positives: pa.ChunkedArray, chosen: Choices, own: pa.ListArray
) -> np.ndarray:
    """Count what was decided and where the positives rank; int64 [Q], the best rank of each query's own."""
    config, plain = searcher.config, problem.plain
    audit.add_decisions(chosen.code_P, plain.score_P)
    audit.counts["deepened"] += int(np.count_nonzero(chosen.plain_Q < config.num_negatives))
    at_H, owner_H = problem.same_texts
    own_Q, values = flat(own)
    rank_N = placed(plain.start_Q, plain.ids, at_H, owner_H, own)
    audit.add_ranks(rank_N, config.depth)
    audit.add_scores("positives", np.asarray(values.field("score")))
    known_Q, known = flat(positives)
    is_known_H = members(owner_H, plain.ids.take(pa.array(at_H)), known_Q, known.field("id"))
    lowest_Q = searcher.lowest(positives)
    audit.add_rules(plain.start_Q, plain.score_P, lowest_Q, at_H[is_known_H], owner_H[is_known_H])
    return best_rank(rank_N, own_Q)


class MineWorker:
    """One actor; `task["way"]` says which kind of work: "search", "reuse", "random" or "classes"."""

    def __init__(self, config: MineConfig, paths: MinePaths) -> None:
        torch.set_num_threads(config.encode.threads_per_actor)
        self._config, self._paths = config, paths
        self._searcher = Searcher(config, paths)

    def work(self, task: dict[str, Any]) -> dict[str, Any]:
        """Search or select for one group of queries; see `retrieval.pool.Worker`."""
        before, rows = self._searcher.again, task["rows"]
        if task["way"] == "search":
            rows = self._search(task)
        elif task["way"] == "reuse":
            queries = self._searcher.queries(task)
            self._select(task, queries, [self._reused(task, queries)])
        else:
            audit = Audit()
            mined = self._random(task, audit) if task["way"] == "random" else self._classes(task, audit)
            self._write(task, mined, audit)
        return {"dataset": task["dataset"], "rows": rows, "again": self._searcher.again - before}

    def _part(self, task: dict[str, Any]) -> str:
        return storage.join(self._paths.select, task["dataset"], task["part"])

    def _write(self, task: dict[str, Any], mined: pa.Table, audit: Audit) -> None:
        storage.write_json(f"{self._part(task)}.json", audit.dump())
        write_table(mined, f"{self._part(task)}.parquet")

    # -- mined negatives ----------------------------------------------------------------------------------------------

    def _search(self, task: dict[str, Any]) -> int:
        """Search one part of the corpus; select when that was the last. Returns the queries selected for."""
        searcher = self._searcher
        queries = searcher.queries(task)
        if task["segment"] is not None:
            searcher.search_segment(task, queries)
        if searcher.left(task):
            return 0
        self._select(task, queries, [self._searched(task, queries, lane) for lane in range(searcher.lanes)])
        return int(queries.num_rows)

    def _searched(self, task: dict[str, Any], queries: pa.Table, lane: int) -> pa.Table:
        """Rows of `SEARCHED_SCHEMA` by one retriever, with the hashes of `PART_SCHEMA`."""
        positives = self._searcher.positives(task, lane)
        ceiling_Q = self._searcher.ceiling(self._searcher.lowest(positives))
        table = self._searcher.searched(task, lane).append_column("example_id", queries.column("key"))
        return table.append_column("positives", positives).append_column("ceiling", pa.array(ceiling_Q))

    def _reused(self, task: dict[str, Any], queries: pa.Table) -> pa.Table:
        """The rows that an earlier mine step searched for the same examples, with text hashes.

        Raises:
            UserError: that step knew other examples, or other positives.
        """
        uri = storage.join(task["reuse"], task["dataset"], "searched.parquet")
        table = read_slice(uri, task["start"], task["rows"])
        same = table.column("example_id").to_pylist() == queries.column("key").to_pylist()
        (known_Q, known), (now_Q, now) = flat(table.column("positives")), flat(queries.column("positives"))
        if same and not (np.array_equal(known_Q, now_Q) and known.field("id").equals(now)):  # in another order?
            listed = [{item["id"] for item in items} for items in table.column("positives").to_pylist()]
            same = listed == [set(keys) for keys in queries.column("positives").to_pylist()]
        if not same:
            raise UserError(
                f"{task['reuse']} did not search for the examples of {task['dataset']!r} with the positives they have "
                "now. Mine again without `reuse`."
            )
        hashed = self._searcher.hashed(task, table, queries)
        for name in ("example_id", "positives", "ceiling"):
            hashed = hashed.append_column(name, table.column(name))
        return hashed

    def _select(self, task: dict[str, Any], queries: pa.Table, lanes: Sequence[pa.Table]) -> None:
        """Apply the rule to what the retrievers found, and write the part."""
        mined, audit = selected(self._searcher, task, queries, lanes)
        if task["way"] == "search":
            searched = lanes[0].select(SEARCHED_SCHEMA.names).cast(SEARCHED_SCHEMA)
            write_table(searched, f"{self._part(task)}.searched")
        self._write(task, mined, audit)

    # -- random negatives ---------------------------------------------------------------------------------------------

    def _random(self, task: dict[str, Any], audit: Audit) -> pa.Table:
        config, queries = self._config, self._searcher.queries(task)
        drawn = random_choices(self._searcher, task, queries.to_pylist())
        kept = [[{"id": key, "score": None} for key in keys] for keys in drawn]
        own = own_positives(queries, None)
        mined, given = mined_table(queries, own, pa.array(kept, SCORED_IDS), config.num_negatives, capped=False)
        audit.counts["given"] += given
        audit.add_examples(one_array(mined.column("negatives")), config.num_negatives)
        return mined

    # -- example-based pairs for classes ------------------------------------------------------------------------------

    def _classes(self, task: dict[str, Any], audit: Audit) -> pa.Table:
        config = self._config
        columns = ["id", "query", "label", "positives", "negatives"]
        table = pa.concat_tables(iter_parquet(task["examples"], columns))
        ids, labels = table.column("id").to_pylist(), table.column("label").to_pylist()
        if None in labels:
            raise UserError(
                f"{task['examples']}: example {ids[labels.index(None)]!r} has no label; every example of a "
                "classification set needs one."
            )
        hash_N = [text_hash(text) for text in table.column("query").to_pylist()]
        texts = ClassExamples.build(ids, labels, hash_N)
        rows = []
        given = table.select(["positives", "negatives"]).slice(task["start"], task["rows"]).to_pylist()
        for index in range(task["start"], task["start"] + task["rows"]):
            generator = example_generator(config.seed, task["dataset"], ids[index])
            own = given[index - task["start"]]
            if own["positives"]:  # labels as documents: the data set itself says which
                drawn_order = generator.permutation(len(own["negatives"]))[: config.num_negatives]
                negatives = [own["negatives"][place] for place in sorted(drawn_order.tolist())]
                audit.add_example(negatives, config.num_negatives)
                known = sorted({ids[index], *(item["id"] for item in own["positives"])})
                rows.append(
                    {
                        "example_id": ids[index],
                        "positives": own["positives"],
                        "negatives": negatives,
                        "known_positives": known,
                    }
                )
                continue
            drawn = example_based(generator, texts, ids[index], labels[index], hash_N[index], config.num_negatives)
            if drawn is None:
                audit.counts["alone_in_its_class"] += 1
                continue
            positive, negatives = drawn
            items = [{"id": key, "score": None} for key in negatives]
            audit.add_example(items, config.num_negatives)
            rows.append(
                {
                    "example_id": ids[index],
                    "positives": [{"id": positive, "score": None}],
                    "negatives": items,
                    "known_positives": sorted({ids[index], positive}),
                }
            )
        return pa.Table.from_pylist(rows, schema=MINED_SCHEMA)
