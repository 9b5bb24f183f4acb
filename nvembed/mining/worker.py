"""The worker inside a mining actor: it searches, selects from what was searched, or draws.

Each group of queries ends as `<select>/<dataset>/part-*.parquet` (`part-*.searched` and the part's audit as
`part-*.json` beside it); a part that exists is complete.

Several retrievers each give their own choice, by the rule on their own scale; the choices are merged by rank, one
retriever's best after another's, without repeating a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nvembed.core import storage
from nvembed.core.parquet import read_slice, read_table
from nvembed.core.vectors import write_shard
from nvembed.mining.audit import Audit
from nvembed.mining.checks import CandidateChecks
from nvembed.mining.config import MineConfig, RandomNegatives, SampledTopK
from nvembed.mining.finish import MINED_SCHEMA, best_rank, mined_table, own_positives, ranks_of
from nvembed.mining.layout import ClassesTask, MinePaths, RandomTask, ReuseTask, SearchTask, Task, task_from_json
from nvembed.mining.lists import (
    SEARCHED_SCHEMA,
    ScoredLists,
    filtered,
    flat,
    grouped,
    joined,
    lowest_scores,
    one_array,
    padded,
    places_of,
    scored_array,
    take_turns,
)
from nvembed.mining.rules import (
    ABSENT,
    ClassExamples,
    Limits,
    consistent,
    draw_order,
    draw_sampled,
    example_based,
    example_generator,
    first_draw,
    rule_limits,
)
from nvembed.mining.search import Searcher
from nvembed.mining.selection import Block, NeedsSearchError, Rankings, Selection, decide, in_lists, select
from nvembed.retrieval.config import ExactIndex
from nvembed.text.identity import stable_hash, text_hash
from nvembed.types import UserError

_DEEPENED = 512  # queries that are searched deeper together


class MineWorker:
    """One actor of the `mine` step; see `core.ray_tasks.Worker`."""

    def __init__(self, config: MineConfig, paths: MinePaths) -> None:
        torch.set_num_threads(config.encode.threads_per_actor)
        self._config, self._paths = config, paths
        self._searcher = Searcher(config, paths)

    def work(self, task: dict[str, Any]) -> dict[str, Any]:
        """Do one task (`layout.task_to_json`); returns its counters."""
        before = self._searcher.again
        rows = self._work(task_from_json(task))
        return {"dataset": task["dataset"], "rows": rows, "again": self._searcher.again - before}

    def _work(self, task: Task) -> int:
        """Rows that the task completed."""
        match task:
            case SearchTask():
                return self._search(task)
            case ReuseTask():
                queries = self._searcher.queries(task)
                self._write(task, *select_negatives(self._searcher, task, queries, [self._reused(task, queries)]))
            case RandomTask():
                self._write(task, *draw_negatives(self._searcher, task))
            case ClassesTask():
                self._write(task, *draw_pairs(self._config, task))
        return task.rows

    def _search(self, task: SearchTask) -> int:
        """Search one part of the corpus; select when that was the last."""
        searcher = self._searcher
        queries = searcher.queries(task)
        if task.segment is not None:
            searcher.search_segment(task, queries)
        if searcher.segments_left(task):
            return 0
        tables = [searcher.searched(task, queries, retriever) for retriever in range(searcher.retrievers)]
        mined, audit = select_negatives(searcher, task, queries, tables)
        searched = tables[0].select(SEARCHED_SCHEMA.names).cast(SEARCHED_SCHEMA)
        write_shard(searched, f"{self._file(task)}.searched")
        self._write(task, mined, audit)
        return int(queries.num_rows)

    def _reused(self, task: ReuseTask, queries: pa.Table) -> pa.Table:
        """The rows that an earlier mine step searched for the same examples, with text hashes.

        Raises:
            UserError: that step had other examples, or other positives.
        """
        earlier = self._paths.searched
        table = read_slice(storage.join(earlier, task.dataset, "searched.parquet"), task.start, task.rows)
        same = table.column("example_id").to_pylist() == queries.column("key").to_pylist() and [
            {item["id"] for item in items} for items in table.column("positives").to_pylist()
        ] == [set(keys) for keys in queries.column("positives").to_pylist()]
        if not same:
            raise UserError(
                f"{earlier} did not search for the examples of {task.dataset!r} with the positives they have now. "
                "Mine again without `reuse`."
            )
        return self._searcher.hashed(task.dataset, table, queries)

    def _file(self, task: Task) -> str:
        return storage.join(self._paths.select, task.dataset, task.group)

    def _write(self, task: Task, mined: pa.Table, audit: Audit) -> None:
        storage.write_json(f"{self._file(task)}.json", audit.dump())
        write_shard(mined, f"{self._file(task)}.parquet")


# -- mined negatives --------------------------------------------------------------------------------------------------


def select_negatives(
    searcher: Searcher, task: SearchTask | ReuseTask, queries: pa.Table, tables: Sequence[pa.Table]
) -> tuple[pa.Table, Audit]:
    """Rows of `MINED_SCHEMA` for a group of queries, and the numbers of the selection.

    Args:
        queries: the group (`search.QUERY_COLUMNS`).
        tables: the results of each retriever (`SEARCHED_SCHEMA`, `PART_SCHEMA`), the first one's first.

    Raises:
        NeedsSearchError: the rule depends on what an earlier step did not search.
    """
    group, config, audit = _Group(searcher, task, queries, tables), searcher.config, Audit()
    rankings = Rankings.read(queries, tables[0], config.depth)
    selection, lists = group.choices(rankings)
    own, negatives, rows = own_positives(queries, tables[0].column("positives")), lists.columns()[0], queries
    best_Q = group.count(audit, rankings, selection, own)
    if config.max_positive_rank is not None:
        good_Q = consistent(best_Q, config.max_positive_rank)
        audit.counts["inconsistent"] += int(np.count_nonzero(~good_Q))
        negatives, own, rows = (each.filter(pa.array(good_Q)) for each in (negatives, own, rows))
    return _mined(audit, config, rows, own, negatives)


def _mined(
    audit: Audit, config: MineConfig, queries: pa.Table, own: pa.ListArray, negatives: pa.ListArray
) -> tuple[pa.Table, Audit]:
    """`mined_table`, counted; with a cap on documents, negatives are counted when it has been applied."""
    mined, given = mined_table(queries, own, negatives, config)
    audit.counts["given"] += given
    if config.max_per_document is None:
        audit.add_examples(one_array(mined.column("negatives")), config.num_negatives)
    return mined, audit


@dataclass(frozen=True)
class _Group:
    """A group of queries, and what each retriever searched for it; see `select_negatives`."""

    searcher: Searcher
    task: SearchTask | ReuseTask
    queries: pa.Table
    tables: Sequence[pa.Table]

    def count(self, audit: Audit, rankings: Rankings, selection: Selection, own: pa.ListArray) -> np.ndarray:
        """Count what was decided and where the positives rank; int64 [Q], the best rank of each query's own."""
        plain, config, positives = rankings.plain, self.searcher.config, self.tables[0].column("positives")
        audit.add_decisions(selection.code_P, plain.score_P)
        audit.counts["deepened"] += int(np.count_nonzero(selection.plain_Q < config.num_negatives))
        at_H, owner_H = selection.same_texts
        own_Q, values = flat(own)
        rank_N = ranks_of(plain.start_Q, plain.ids, at_H, owner_H, own)
        audit.add_ranks(rank_N, config.depth)
        audit.add_scores("positives", np.asarray(values.field("score")))
        positive_Q, positive = flat(positives)
        positive_H = places_of(owner_H, plain.ids.take(pa.array(at_H)), positive_Q, positive.field("id")) >= 0
        audit.add_rules(plain.start_Q, plain.score_P, lowest_scores(positives), at_H[positive_H], owner_H[positive_H])
        return best_rank(rank_N, own_Q)

    def choices(self, rankings: Rankings) -> tuple[Selection, ScoredLists]:
        """The selection from the first retriever's search, and the choice of all retrievers."""
        config, rule, queries = self.searcher.config, self.searcher.config.rule, self.queries
        assert not isinstance(rule, RandomNegatives)
        checks = self._checks(queries, np.arange(queries.num_rows), self.tables)
        limits = [rule_limits(rule, lowest_scores(table.column("positives"))) for table in self.tables]
        selection = _select(config, rankings, limits[0], checks)
        lists = [self._completed(limits[0], selection)]
        for table, limit in zip(self.tables[1:], limits[1:], strict=True):
            lists.append(_select(config, Rankings.read(queries, table, config.depth), limit, checks).selected)
        if isinstance(rule, SampledTopK):
            lists = [_drawn(config, rule, self.task.dataset, queries, pool) for pool in lists]
        count = config.num_negatives if config.max_per_document is None else config.depth
        return selection, take_turns(lists, count) if len(lists) > 1 else lists[0]

    def _checks(self, queries: pa.Table, rows_Q: np.ndarray, tables: Sequence[pa.Table]) -> CandidateChecks | None:
        """The recipe's checks of candidates that read texts or ask another model."""
        config = self.searcher.config
        if config.near_duplicate is None and config.candidate_filter is None:
            return None
        ids = [flat(table.column(name))[1].field("id") for table in tables for name in ("plain", "under")]
        return CandidateChecks(self.searcher, self.task, queries, rows_Q, pa.concat_arrays(ids))

    def _completed(self, limits: Limits, selection: Selection) -> ScoredLists:
        """The candidates of a selection; where a query's lists were too short, of ever deeper ones.

        Raises:
            NeedsSearchError: the lists are an earlier step's.
        """
        searcher, task, queries, config = self.searcher, self.task, self.queries, self.searcher.config
        short = np.flatnonzero(selection.missing_Q != "")
        if len(short) and isinstance(task, ReuseTask):
            example = queries.column("key")[short[0]].as_py()
            raise NeedsSearchError(f"example {example!r}: {selection.missing_Q[short[0]]}")
        if not len(short) or not isinstance(task, SearchTask) or not isinstance(config.search.index, ExactIndex):
            return selection.selected  # an approximate index has nothing more
        parts = [(np.arange(queries.num_rows), selection.selected)]
        query_QD = searcher.query_vectors(task, 0)
        for start in range(0, len(short), _DEEPENED):
            rows, depth = short[start : start + _DEEPENED], config.depth
            while len(rows):
                depth = min(4 * depth, task.corpus + 1)  # one more than there are: then nothing is missing
                few = queries.take(pa.array(rows))
                table = searcher.deeper(task.dataset, few, query_QD[rows], limits.ceiling_Q[rows], depth)
                checks = self._checks(few, rows, [table])
                deeper = _select(config, Rankings.read(few, table, depth), limits.of(rows), checks)
                parts.append((rows, deeper.selected))
                rows = rows[deeper.missing_Q != ""]
        return ScoredLists.gather(parts, queries.num_rows)


def _select(config: MineConfig, rankings: Rankings, limits: Limits, checks: CandidateChecks | None) -> Selection:
    """`select` by the recipe; with a cap, queries that lose a document need others: all that qualify are selected."""
    capped, enough = config.max_per_document is not None, config.num_negatives
    if isinstance(config.rule, SampledTopK):
        enough = config.rule.top
    check = None if checks is None else checks.of(rankings)
    return select(rankings, limits, config.depth if capped else enough, enough, capped=capped, check=check)


def _drawn(config: MineConfig, rule: SampledTopK, dataset: str, queries: pa.Table, pool: ScoredLists) -> ScoredLists:
    """The draw from every query's pool."""
    keys = queries.column("key").to_pylist()
    key_Q = np.array([stable_hash(config.seed, dataset, key) for key in keys], dtype=np.uint64)
    key_P = np.array([stable_hash(name) for name in pool.ids.to_pylist()], dtype=np.uint64)
    flat_P = np.ones(len(key_P), dtype=bool), pool.score_P, key_P, np.arange(len(key_P))
    allowed_QT, score_QT, key_QT, at_QT = (padded(pool.start_Q, values_P, 0, rule.top) for values_P in flat_P)
    column_QK = draw_sampled(allowed_QT, score_QT, config.num_negatives, rule, key_Q, key_QT)
    row, place = np.nonzero(column_QK != ABSENT)
    return pool.take(grouped(row, len(keys)), at_QT[row, column_QK[row, place]])


# -- drawn negatives --------------------------------------------------------------------------------------------------


def draw_negatives(searcher: Searcher, task: RandomTask) -> tuple[pa.Table, Audit]:
    """Rows of `MINED_SCHEMA` with uniform draws from the corpus, and their numbers."""
    queries = searcher.queries(task)
    negatives = random_lists(searcher, task, queries)
    return _mined(Audit(), searcher.config, queries, own_positives(queries, None), negatives)


def random_lists(searcher: Searcher, task: RandomTask, queries: pa.Table) -> pa.ListArray:
    """`num_negatives` documents for each query in drawn order (`SCORED_IDS`, no score).

    Known positives and repeated texts are left out.

    Every example draws from a generator of its own, so the division into groups changes nothing. Documents of a whole
    group are looked up together: memory depends on the draws, not on the corpus.
    """
    config = searcher.config
    generators = [example_generator(config.seed, task.dataset, key) for key in queries.column("key").to_pylist()]
    never_Q, never = flat(queries.column("never"))
    hash_N, present_N = searcher.hashes_of(task.dataset, never)
    own = np.arange(queries.num_rows + 1), queries.column("hash").to_numpy()
    never_hashes = joined(own, (filtered(never_Q, present_N), hash_N[present_N]))
    rows_R, drawn = np.arange(queries.num_rows), first_draw(config.num_negatives)
    owner_K, ids = [np.empty(0, dtype=np.int64)], [pa.array([], pa.string())]
    while len(rows_R):
        order_RC = np.array([draw_order(generators[row], task.corpus, drawn) for row in rows_R], dtype=np.int64)
        place_U, at_RC = np.unique(order_RC, return_inverse=True)
        at_RC = at_RC.reshape(order_RC.shape)
        id_U, hash_U = searcher.documents_at(task.dataset, place_U)
        never_RC = in_lists(never_hashes, rows_R, hash_U[at_RC])
        block = Block(np.zeros(at_RC.shape), np.ones(at_RC.shape, dtype=bool), never_RC, hash_U[at_RC])
        kept_RC = decide(block, Limits(np.full(len(rows_R), np.inf)), config.num_negatives)[1]
        done_R = (kept_RC.sum(axis=1) == config.num_negatives) | (order_RC.shape[1] == task.corpus)
        row, column = np.nonzero(kept_RC & done_R[:, None])
        owner_K.append(rows_R[row])
        ids.append(id_U.take(pa.array(at_RC[row, column])))
        rows_R, drawn = rows_R[~done_R], 4 * drawn
    order_K = np.argsort(np.concatenate(owner_K), kind="stable")
    start_Q = grouped(np.concatenate(owner_K), queries.num_rows)
    return scored_array(start_Q, pa.concat_arrays(ids).take(pa.array(order_K)), pa.nulls(len(order_K), pa.float64()))


def draw_pairs(config: MineConfig, task: ClassesTask) -> tuple[pa.Table, Audit]:
    """Rows of `MINED_SCHEMA` for examples with labels: pairs that the data set gives, else example-based ones.

    Raises:
        UserError: an example without a label.
    """
    audit = Audit()
    table = read_table(task.examples, ["id", "query", "label", "positives", "negatives"])
    ids, labels = table.column("id").to_pylist(), table.column("label").to_pylist()
    if None in labels:
        raise UserError(
            f"{task.examples}: example {ids[labels.index(None)]!r} has no label; every example of a classification set "
            "needs one."
        )
    hash_N = [text_hash(text) for text in table.column("query").to_pylist()]
    texts = ClassExamples.build(ids, labels, hash_N)
    rows = []
    given = table.select(["positives", "negatives"]).slice(task.start, task.rows).to_pylist()
    for index, own in enumerate(given, start=task.start):
        generator = example_generator(config.seed, task.dataset, ids[index])
        if own["positives"]:  # labels as documents
            order = generator.permutation(len(own["negatives"]))[: config.num_negatives]
            positives, negatives = own["positives"], [own["negatives"][place] for place in sorted(order.tolist())]
        else:
            pair = example_based(generator, texts, ids[index], labels[index], hash_N[index], config.num_negatives)
            if pair is None:
                audit.counts["alone_in_its_class"] += 1
                continue
            positives, negatives = ([{"id": key, "score": None} for key in keys] for keys in ([pair[0]], pair[1]))
        known = sorted({ids[index], *(item["id"] for item in positives)})
        rows.append((ids[index], positives, negatives, known))
    mined = pa.Table.from_pylist([dict(zip(MINED_SCHEMA.names, row, strict=True)) for row in rows], schema=MINED_SCHEMA)
    if config.max_per_document is None:  # else counted when the cap has been applied
        audit.add_examples(one_array(mined.column("negatives")), config.num_negatives)
    return mined, audit
