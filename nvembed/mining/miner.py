"""The workers inside the mining actors: they search, and select from what was found.

Each group of queries ends as `<select>/<dataset>/part-*.parquet` (`part-*.searched` and the part's audit as
`part-*.json` beside it); a part that is there is complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch

from nvembed import storage
from nvembed.data.tables import SCORED_IDS
from nvembed.mining.audit import Audit
from nvembed.mining.choosing import Chooser, read_hashes
from nvembed.mining.config import MineConfig
from nvembed.mining.searched import SEARCHED_SCHEMA
from nvembed.mining.searching import MinePaths, Searcher
from nvembed.mining.selection import (
    ClassExamples,
    example_based,
    example_generator,
    random_negatives,
    text_hash,
)
from nvembed.retrieval.shards import iter_parquet, list_shards, read_table, write_table

__all__ = ["MINED_SCHEMA", "MinePaths", "MineWorker"]

MINED_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("positives", SCORED_IDS, nullable=False),
        pa.field("negatives", SCORED_IDS, nullable=False),
        pa.field("known_positives", pa.list_(pa.string()), nullable=False),
    ]
)


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
            queries = self._searcher.query_rows(task)
            self._select(task, queries, [self._reused(task, queries)])
        else:
            audit = Audit()
            mined = self._random(task, audit) if task["way"] == "random" else self._classes(task, audit)
            self._write(task, mined, audit)
        return {"dataset": task["dataset"], "rows": rows, "again": self._searcher.again - before}

    def _part(self, task: dict[str, Any]) -> str:
        return storage.join(self._paths.select, task["dataset"], task["part"])

    def _write(self, task: dict[str, Any], rows: list[dict[str, Any]], audit: Audit) -> None:
        storage.write_json(f"{self._part(task)}.json", audit.dump())
        write_table(pa.Table.from_pylist(rows, schema=MINED_SCHEMA), f"{self._part(task)}.parquet")

    # -- mined negatives ----------------------------------------------------------------------------------------------

    def _search(self, task: dict[str, Any]) -> int:
        """Search one part of the corpus; select when that was the last. Returns the queries selected for."""
        searcher = self._searcher
        queries = searcher.query_rows(task)
        if task["segment"] is not None:
            searcher.search_segment(task, queries)
        if searcher.left(task):
            return 0
        self._select(task, queries, [self._searched(task, queries, lane) for lane in range(searcher.lanes)])
        return len(queries)

    def _searched(self, task: dict[str, Any], queries: list[dict[str, Any]], lane: int) -> list[dict[str, Any]]:
        """Rows of `SEARCHED_SCHEMA` by one miner."""
        positives = self._searcher.positives(task, queries, lane)
        ceiling_Q = self._searcher.ceiling(positives)
        rows: list[dict[str, Any]] = self._searcher.searched(task, lane).to_pylist()
        for row, query, found, ceiling in zip(rows, queries, positives, ceiling_Q, strict=True):
            row["example_id"], row["ceiling"] = query["key"], float(ceiling)
            row["positives"] = [{"id": key, "score": score} for key, score in found.items()]
        return rows

    def _reused(self, task: dict[str, Any], queries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows that an earlier mine step searched for the same examples.

        Raises:
            UserError: that step knew other examples, or other positives.
        """
        table = read_table(storage.join(task["reuse"], task["dataset"], "searched.parquet"))
        rows: list[dict[str, Any]] = table.slice(task["start"], task["rows"]).to_pylist()
        known = [(row["example_id"], {item["id"] for item in row["positives"]}) for row in rows]
        now = [(query["key"], set(query["positives"])) for query in queries]
        if known != now:
            raise storage.UserError(
                f"{task['reuse']} did not search for the examples of {task['dataset']!r} with the positives they have "
                "now. Mine again without `reuse`."
            )
        return rows

    def _select(
        self, task: dict[str, Any], queries: list[dict[str, Any]], lanes: Sequence[list[dict[str, Any]]]
    ) -> None:
        """Apply the rule to what the miners found, and write the part."""
        config, audit, searched = self._config, Audit(), lanes[0]
        wanted = {key for query in queries for key in query["never"]}
        wanted |= {item["id"] for rows in lanes for row in rows for name in ("plain", "under") for item in row[name]}
        hashes = read_hashes(self._searcher, task["dataset"], wanted)
        chooser = Chooser(self._searcher, task, queries, lanes, hashes, deepen=task["way"] == "search")
        rows = []
        for query, row, choice in zip(queries, searched, chooser.run(), strict=True):
            audit.add_selection(choice.plain, [item["score"] for item in row["plain"]])
            audit.counts["deepened"] += len(choice.plain.kept) < config.num_negatives
            scores = {item["id"]: item["score"] for item in row["positives"]}
            own = query["positives"][: query["own"]]
            best = audit.add_positives([scores[key] for key in own], own, row, config.depth)
            audit.add_rules(row, min(scores.values()))
            if config.max_positive_rank is not None and not (best is not None and best <= config.max_positive_rank):
                audit.counts["inconsistent"] += 1
                continue
            kept = choice.kept if config.max_per_document is not None else choice.kept[: config.num_negatives]
            mined = [{"id": key, "score": score} for key, score in kept]
            rows.append(self._row(query, [{"id": key, "score": scores[key]} for key in own], mined, audit))
        write_table(pa.Table.from_pylist(list(searched), schema=SEARCHED_SCHEMA), f"{self._part(task)}.searched")
        self._write(task, rows, audit)

    def _row(
        self, row: dict[str, Any], positives: list[dict[str, Any]], mined: list[dict[str, Any]], audit: Audit
    ) -> dict[str, Any]:
        """A mined row: negatives that the data set itself gives come first (score null), mined ones fill up.

        With a cap on documents all candidates stay in for now; the cap decides when all groups are there.
        """
        config = self._config
        never = set(row["never"])
        given = [key for key in dict.fromkeys(row["given"]) if key not in never][: config.num_negatives]
        audit.counts["given"] += len(given)
        mined = [item for item in mined if item["id"] not in given]
        negatives = [{"id": key, "score": None} for key in given] + mined
        if config.max_per_document is None:
            negatives = negatives[: config.num_negatives]
            audit.add_example(negatives, config.num_negatives)
        return {
            "example_id": row["key"],
            "positives": positives,
            "negatives": negatives,
            "known_positives": sorted(never),
        }

    # -- random negatives ---------------------------------------------------------------------------------------------

    def _random(self, task: dict[str, Any], audit: Audit) -> list[dict[str, Any]]:
        config = self._config
        pairs = sorted(self._document_hashes(task["dataset"]))
        ids, hash_N = [key for key, _ in pairs], [digest for _, digest in pairs]
        by_id = dict(pairs)
        rows = []
        for row in self._searcher.query_rows(task):
            kept = random_negatives(
                example_generator(config.seed, task["dataset"], row["key"]),
                ids,
                hash_N,
                never_ids=set(row["never"]),
                never_hashes={row["hash"], *(by_id[key] for key in row["never"] if key in by_id)},
                count=config.num_negatives,
            )
            own = [{"id": key, "score": None} for key in row["positives"][: row["own"]]]
            rows.append(self._row(row, own, [{"id": ids[place], "score": None} for place in kept], audit))
        return rows

    # -- example-based pairs for classes ------------------------------------------------------------------------------

    def _classes(self, task: dict[str, Any], audit: Audit) -> list[dict[str, Any]]:
        config = self._config
        columns = ["id", "query", "label", "positives", "negatives"]
        table = pa.concat_tables(iter_parquet(task["examples"], columns))
        ids, labels = table.column("id").to_pylist(), table.column("label").to_pylist()
        if None in labels:
            raise storage.UserError(
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
        return rows

    def _document_hashes(self, dataset: str) -> Iterator[tuple[str, int]]:
        root = storage.join(self._paths.texts, dataset, "documents")
        for name in list_shards(root):
            table = read_table(storage.join(root, name), ["key", "hash"])
            yield from zip(table.column("key").to_pylist(), table.column("hash").to_pylist(), strict=True)
