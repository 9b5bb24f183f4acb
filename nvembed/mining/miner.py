"""The workers inside the mining actors: queries of one data set against all its documents, shard by shard.

Each task writes `<select>/<dataset>/part-*.parquet` and the part's audit; a part that is there is complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nvembed import storage
from nvembed.data.tables import SCORED_IDS
from nvembed.mining.audit import Audit
from nvembed.mining.config import MineConfig, TopKPercPos
from nvembed.mining.selection import (
    ClassExamples,
    Selection,
    ceiling,
    example_based,
    example_generator,
    random_negatives,
    select_negatives,
    text_hash,
)
from nvembed.retrieval.search import pair_scores, search_exact
from nvembed.retrieval.shards import iter_parquet, iter_vectors, list_shards, read_table, table_matrix, write_table

MINED_SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("positives", SCORED_IDS, nullable=False),
        pa.field("negatives", SCORED_IDS, nullable=False),
        pa.field("known_positives", pa.list_(pa.string()), nullable=False),
    ]
)


@dataclass(frozen=True)
class MinePaths:
    """Working directories of one `mine` step."""

    texts: str
    vectors: str
    select: str

    @classmethod
    def under(cls, work_uri: str) -> MinePaths:
        """The layout below a step's `checkpoints/`."""
        root = storage.join(work_uri, "checkpoints")
        return cls(*(storage.join(root, name) for name in ("texts", "vectors", "select")))


class MineWorker:
    """One actor; `task["way"]` says which kind of work: "search", "random" or "classes"."""

    def __init__(self, config: MineConfig, paths: MinePaths) -> None:
        torch.set_num_threads(config.encode.threads_per_actor)
        self._config, self._paths = config, paths

    def work(self, task: dict[str, Any]) -> dict[str, Any]:
        """Select for one group of queries; see `retrieval.pool.Worker`."""
        audit = Audit()
        ways = {"search": self._search, "random": self._random, "classes": self._classes}
        rows = ways[task["way"]](task, audit)
        part = storage.join(self._paths.select, task["dataset"], task["part"])
        storage.write_json(f"{part}.json", audit.dump())
        write_table(pa.Table.from_pylist(rows, schema=MINED_SCHEMA), f"{part}.parquet")
        return {"dataset": task["dataset"], "rows": task["rows"]}

    # -- mined negatives ----------------------------------------------------------------------------------------------

    def _search(self, task: dict[str, Any], audit: Audit) -> list[dict[str, Any]]:
        dataset, config = task["dataset"], self._config
        assert isinstance(config.rule, TopKPercPos)
        queries = self._query_rows(task)
        query_QD = np.concatenate(
            [
                table_matrix(read_table(storage.join(self._paths.vectors, dataset, "queries", name)))
                for name in task["shards"]
            ]
        )
        tap = VectorTap({key for row in queries for key in row["positives"]})
        ids, scores = search_exact(
            query_QD, tap.watch(self._document_vectors(dataset)), config.depth, config.search.block_documents
        )
        positive_scores = tap.scores(queries, query_QD)
        below_Q = np.array([ceiling(list(found.values()), config.rule.share) for found in positive_scores])
        hashes = self._hashes(dataset, [ids, [row["never"] for row in queries]])
        selections = [
            _select(row, ids[index], scores[index], hashes, below_Q[index], config.num_negatives)
            for index, row in enumerate(queries)
        ]
        for index, selection in enumerate(selections):
            audit.add_selection(selection, list(scores[index]))
            _audit_positives(audit, queries[index], ids[index], positive_scores[index], config.depth)
        found_ids, found_scores = list(ids), list(scores)
        self._deepen(dataset, queries, query_QD, below_Q, (found_ids, found_scores, selections), hashes, audit)
        rows = []
        for index, row in enumerate(queries):
            negatives: list[dict[str, Any]] = [
                {"id": found_ids[index][place], "score": float(found_scores[index][place])}
                for place in selections[index].kept
            ]
            audit.add_scores("negatives", (item["score"] for item in negatives))
            own = [{"id": key, "score": positive_scores[index][key]} for key in row["positives"][: row["own"]]]
            rows.append(self._row(row, own, negatives, audit))
        return rows

    def _deepen(
        self,
        dataset: str,
        queries: list[dict[str, Any]],
        query_QD: np.ndarray,
        below_Q: np.ndarray,
        found: tuple[list[list[str]], list[np.ndarray], list[Selection]],
        hashes: dict[str, int],
        audit: Audit,
    ) -> None:
        """Search again, only below the ceiling, for queries whose first `depth` candidates gave too few negatives.

        NV-Retriever filters first and takes the top of what is left; where the positive itself ranks deep, everything
        above it is too close and the plain top `depth` would leave the example without a negative.
        """
        config = self._config
        short = [index for index, selection in enumerate(found[2]) if len(selection.kept) < config.num_negatives]
        audit.counts["deepened"] += len(short)
        if not short:
            return
        ids, scores = search_exact(
            query_QD[short],
            self._document_vectors(dataset),
            config.depth + max(len(queries[index]["never"]) for index in short),
            config.search.block_documents,
            below_Q=below_Q[short],
        )
        hashes.update(self._hashes(dataset, [ids]))
        for place, index in enumerate(short):
            found[0][index], found[1][index] = ids[place], scores[place]
            found[2][index] = _select(
                queries[index], ids[place], scores[place], hashes, below_Q[index], config.num_negatives
            )

    def _row(
        self, row: dict[str, Any], positives: list[dict[str, Any]], mined: list[dict[str, Any]], audit: Audit
    ) -> dict[str, Any]:
        """A mined row: negatives that the data set itself gives come first (score null), mined ones fill up."""
        count = self._config.num_negatives
        never = set(row["never"])
        given = [key for key in dict.fromkeys(row["given"]) if key not in never][:count]
        audit.counts["given"] += len(given)
        mined = [item for item in mined if item["id"] not in given]
        negatives = ([{"id": key, "score": None} for key in given] + mined)[:count]
        audit.add_example(len(negatives), count)
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
        for row in self._query_rows(task):
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
                audit.add_example(len(negatives), config.num_negatives)
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
            audit.add_example(len(negatives), config.num_negatives)
            rows.append(
                {
                    "example_id": ids[index],
                    "positives": [{"id": positive, "score": None}],
                    "negatives": [{"id": key, "score": None} for key in negatives],
                    "known_positives": sorted({ids[index], positive}),
                }
            )
        return rows

    # -- reading ------------------------------------------------------------------------------------------------------

    def _query_rows(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        root = storage.join(self._paths.texts, task["dataset"], "queries")
        columns = ["key", "hash", "positives", "own", "never", "given"]
        return [row for name in task["shards"] for row in read_table(storage.join(root, name), columns).to_pylist()]

    def _document_vectors(self, dataset: str) -> Iterator[tuple[list[str], np.ndarray]]:
        return iter_vectors(storage.join(self._paths.vectors, dataset, "documents"))

    def _document_hashes(self, dataset: str) -> Iterator[tuple[str, int]]:
        root = storage.join(self._paths.texts, dataset, "documents")
        for name in list_shards(root):
            table = read_table(storage.join(root, name), ["key", "hash"])
            yield from zip(table.column("key").to_pylist(), table.column("hash").to_pylist(), strict=True)

    def _hashes(self, dataset: str, lists: list[Sequence[Sequence[str]]]) -> dict[str, int]:
        """Text hashes of the named documents only: one pass over two columns instead of a map of the corpus."""
        wanted = {key for group in lists for keys in group for key in keys}
        return {key: digest for key, digest in self._document_hashes(dataset) if key in wanted}


class VectorTap:
    """Copies the vectors of some documents out of a stream of shards that a search reads."""

    def __init__(self, wanted: set[str]) -> None:
        self._wanted = wanted
        self._vectors: dict[str, np.ndarray] = {}

    def watch(self, shards: Iterable[tuple[list[str], np.ndarray]]) -> Iterator[tuple[list[str], np.ndarray]]:
        """The same stream."""
        for ids, matrix_ND in shards:
            for position, key in enumerate(ids):
                if key in self._wanted:
                    self._vectors[key] = matrix_ND[position].copy()
            yield ids, matrix_ND

    def scores(self, queries: list[dict[str, Any]], query_QD: np.ndarray) -> list[dict[str, float]]:
        """Exact score of each query's positives, by id.

        Raises:
            UserError: a positive is not in the corpus.
        """
        pairs = [(index, key) for index, row in enumerate(queries) for key in row["positives"]]
        for index, key in pairs:
            if key not in self._vectors:
                raise storage.UserError(
                    f"example {queries[index]['key']!r} names {key!r} as its positive, which is not in the corpus "
                    "of its data set. Prepare the data set again."
                )
        values = pair_scores(
            query_QD[[index for index, _ in pairs]], np.stack([self._vectors[key] for _, key in pairs])
        )
        found: list[dict[str, float]] = [{} for _ in queries]
        for (index, key), value in zip(pairs, values, strict=True):
            found[index][key] = float(value)
        return found


def _select(
    row: dict[str, Any], ids: list[str], scores: np.ndarray, hashes: dict[str, int], below: float, count: int
) -> Selection:
    return select_negatives(
        ids,
        [float(score) for score in scores[: len(ids)]],
        [hashes[key] for key in ids],
        below=below,
        never_ids=set(row["never"]),
        never_hashes={row["hash"], *(hashes[key] for key in row["never"] if key in hashes)},
        count=count,
    )


def _audit_positives(audit: Audit, row: dict[str, Any], ids: list[str], scores: dict[str, float], depth: int) -> None:
    place = {key: index + 1 for index, key in enumerate(ids)}
    for key in row["positives"][: row["own"]]:
        audit.add_rank(place.get(key), depth)
    audit.add_scores("positives", (scores[key] for key in row["positives"][: row["own"]]))
