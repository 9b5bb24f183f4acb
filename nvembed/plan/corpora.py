"""Rows that mining searches and how they are cut: shards, groups of queries, parts of the documents. Exact counts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvembed.data.config import HpoClassesSource, HpoSimilaritySource, RowSource, SourceConfig
from nvembed.mining.config import MineConfig
from nvembed.recipe.schema import Recipe
from nvembed.types import UserError

MIN_SHARDS = 8  # of a small set; `retrieval/shards.py`, which needs pyarrow, says the same

_ROWS = re.compile(r"^(?:(?P<name>[^=]+)=)?(?P<q>[\d.]+[kMB]?)x(?P<d>[\d.]+[kMB]?)$")
_UNITS = {"k": 10**3, "M": 10**6, "B": 10**9}
Rows = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Corpus:
    """A data set that is searched, with its approximate numbers of queries and documents; None where unknown."""

    name: str
    queries: int | None
    documents: int | None

    @property
    def rows(self) -> int | None:
        """Texts that are encoded."""
        return None if self.queries is None or self.documents is None else self.queries + self.documents


@dataclass(frozen=True)
class Division:
    """How a corpus is cut. All are counts.

    Attributes:
        query_shards, document_shards: files of vectors.
        group_rows: queries that are searched together.
        passes: groups, each of which reads every document once.
        parts: tasks that a pass is cut into.
    """

    query_shards: int
    document_shards: int
    group_rows: int
    passes: int
    parts: int

    @property
    def tasks(self) -> int:
        """Tasks of the actor pool."""
        return self.passes * self.parts


# -- rows -------------------------------------------------------------------------------------------------------------


def source_kind(source: SourceConfig) -> str:
    """`classes`, `similarity` or `retrieval`."""
    task = source.task if isinstance(source, RowSource) else "retrieval"
    if isinstance(source, HpoClassesSource) or task in ("classification", "clustering"):
        return "classes"
    return "similarity" if isinstance(source, HpoSimilaritySource) or task == "sts" else "retrieval"


def searched_sets(recipe: Recipe, rows: Rows | None = None) -> list[Corpus]:
    """The sets that mining searches, with their rows by `rows` or else by the sources' caps.

    Where only documents are capped, as many queries are taken; a pair of a similarity set gives two documents.

    Raises:
        UserError: `rows` names a set that is not searched, or names none where there are several.
    """
    rows = dict(rows or {})
    searched = [source for source in recipe.prepare.sources if source_kind(source) != "classes"]
    names = [source.name for source in searched]
    if "" in rows:
        if len(names) != 1:
            raise UserError(f"--rows: name the set, NAME=QUERIESxDOCUMENTS. Mining searches: {', '.join(names)}.")
        rows[names[0]] = rows.pop("")
    wrong = sorted(set(rows) - set(names))
    if wrong:
        raise UserError(f"--rows: mining does not search {wrong[0]!r}. It searches: {', '.join(names)}.")
    corpora = []
    for source in searched:
        queries = source.max_train or source.max_documents
        pairs = None if queries is None else 2 * queries
        documents = source.max_documents if source_kind(source) == "retrieval" else pairs
        corpora.append(Corpus(source.name, *rows.get(source.name, (queries, documents))))
    return corpora


def parse_rows(texts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """`msmarco=500kx8.8M` or, for the only set, `10Mx1B`, as name -> (queries, documents).

    Raises:
        UserError: a text has another form.
    """
    rows = {}
    for text in texts:
        match = _ROWS.match(text.strip())
        try:
            assert match is not None
            queries, documents = _number(match["q"]), _number(match["d"])
            assert queries >= 1 and documents >= 1
        except (AssertionError, ValueError) as error:
            raise UserError(
                f"--rows {text}: write [NAME=]QUERIESxDOCUMENTS, such as 10kx1M or nq=100kx2.7M."
            ) from error
        rows[match["name"] or ""] = (queries, documents)
    return rows


def _number(text: str) -> int:
    unit = _UNITS.get(text[-1], 1)
    return round(float(text.rstrip("kMB")) * unit)


# -- division ---------------------------------------------------------------------------------------------------------


def shard_count(rows: int, shard_rows: int) -> int:
    """Number of files of a set."""
    return min(MIN_SHARDS, rows) if rows < MIN_SHARDS * shard_rows else -(-rows // shard_rows)


def _grouped(rows: int, shard_rows: int, limit: int) -> tuple[int, int]:
    """Rows of the largest group of whole shards within `limit` (one shard at least), and how many groups there are."""
    if rows < MIN_SHARDS * shard_rows:  # cut evenly, so sizes differ by one
        shards, groups = shard_count(rows, shard_rows), list[int]()
        for number in range(shards):
            size = rows * (number + 1) // shards - rows * number // shards
            if groups and groups[-1] + size <= limit:
                groups[-1] += size
            else:
                groups.append(size)
        return max(groups), len(groups)
    full, rest = divmod(rows, shard_rows)
    together = max(limit // shard_rows, 1)
    count = -(-full // together)
    last = (full - (count - 1) * together) * shard_rows
    if rest and last + rest > limit:
        return together * shard_rows, count + 1
    return max(together * shard_rows if count > 1 else 0, last + rest), count


def division(queries: int, documents: int, config: MineConfig) -> Division:
    """The division of a set with these numbers of queries and documents."""
    shard = config.encode.shard_rows
    limit = min(config.search.query_rows, max(-(-queries // config.encode.actors), 1))
    group_rows, passes = _grouped(queries, shard, limit)
    _, parts = _grouped(documents, shard, config.search.document_rows)
    return Division(shard_count(queries, shard), shard_count(documents, shard), group_rows, passes, parts)
