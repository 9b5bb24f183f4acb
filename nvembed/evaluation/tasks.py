"""Held-out sets of the three kinds of tasks: their texts, and scores from the texts' vectors.

- retrieval: each query, with its instruction, searched exactly in the *whole* corpus, documents bare.
- classification: held-out classes never occur in training, so their texts are cut into two halves by hash,
  class by class: one is the reference, the other is labelled by its k nearest neighbours (cosine). v-measure: k-means
  over both halves, as many clusters as classes, averaged over several seeds. Texts carry the instruction.
- sts: cosine of both texts, both with the instruction, against the gold score.

Shapes: N items, Q queries, D width, R clusterings.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from nvembed.core.parquet import iter_parquet, read_table
from nvembed.data.fit import cap_examples
from nvembed.data.tables import CORPUS, document_text, read_examples
from nvembed.evaluation.metrics import RECALL_DEPTH, knn_labels, retrieval_values, vote
from nvembed.evaluation.significance import (
    Interval,
    bootstrap,
    bootstrap_v_measure,
    mean_statistic,
    spearman_statistic,
)
from nvembed.losses.matryoshka import prefix_rows
from nvembed.retrieval.bm25 import search_bm25
from nvembed.retrieval.exact.search import search_exact
from nvembed.text.identity import stable_hash
from nvembed.types import Artifact, TaskType, TrainingExample, UserError

Row = tuple[str, str, str]  # key, text, prompt
Vectors = Callable[[str], Iterator[tuple[list[str], np.ndarray]]]  # role -> shards of (keys, float32 [N, D])

_BM25_BLOCK = 1024


@dataclass(frozen=True)
class Settings:
    """Settings of the metrics; see `EvaluateConfig`."""

    samples: int
    seed: int
    neighbours: int
    clusterings: int


@dataclass(frozen=True)
class Caps:
    """Sizes of a small comparison; the positives of its queries are always in it."""

    documents: int
    queries: int
    seed: int


@dataclass(frozen=True)
class Scored:
    """One metric of one system on one data set.

    Attributes:
        item_ids: empty where the metric is no function of single items (v_measure).
        values: per item: the metric, for spearman the predicted similarity.
        gold: per item, spearman only.
    """

    metric: str
    interval: Interval
    item_ids: Sequence[str] = ()
    values: Sequence[float] = ()
    gold: Sequence[float] | None = None


class HeldOut(ABC):
    """The held-out examples of one data set."""

    def __init__(self, dataset: str, prompt: str, examples: list[TrainingExample]) -> None:
        self.dataset = dataset
        self.prompt = prompt
        self.examples = examples

    @abstractmethod
    def roles(self) -> Mapping[str, Callable[[], Iterator[Row]]]:
        """The texts that need vectors, by role; each call streams them anew."""

    @abstractmethod
    def score(self, vectors: Vectors, settings: Settings) -> list[Scored]:
        """Scores of a model from its vectors, primary metric first."""

    @abstractmethod
    def score_bm25(self, settings: Settings) -> list[Scored]:
        """Scores of BM25, as far as it has the metric."""

    def _per_item(self, metric: str, ids: Sequence[str], values: Sequence[float], settings: Settings) -> Scored:
        value_N = np.asarray(values, dtype=np.float64)
        interval = bootstrap(mean_statistic(value_N), len(value_N), settings.samples, settings.seed)
        return Scored(metric, interval, ids, value_N.tolist())


class RetrievalSet(HeldOut):
    """Queries against a corpus; `keep` names the documents of a capped corpus."""

    def __init__(
        self,
        dataset: str,
        prompt: str,
        examples: list[TrainingExample],
        corpus_uri: str,
        keep: frozenset[str] | None = None,
    ) -> None:
        super().__init__(dataset, prompt, examples)
        self._corpus_uri = corpus_uri
        self._keep = keep

    def roles(self) -> Mapping[str, Callable[[], Iterator[Row]]]:
        return {
            "queries": lambda: ((row.id, row.query, self.prompt) for row in self.examples),
            "documents": lambda: ((key, text, "") for key, text in self._documents()),
        }

    def score(self, vectors: Vectors, settings: Settings) -> list[Scored]:
        query_QD = _rows_of(vectors("queries"), [row.id for row in self.examples])
        ranked, _ = search_exact(query_QD, vectors("documents"), RECALL_DEPTH)
        return self._scored(ranked, settings)

    def score_bm25(self, settings: Settings) -> list[Scored]:
        documents = dict(self._documents())
        queries = [row.query for row in self.examples]
        ranked, _ = search_bm25(list(documents), list(documents.values()), queries, RECALL_DEPTH)
        return self._scored(ranked, settings)

    def _documents(self) -> Iterator[tuple[str, str]]:
        for table in iter_parquet(self._corpus_uri, ["id", "title", "text"]):
            for row in table.to_pylist():
                if self._keep is None or row["id"] in self._keep:
                    yield row["id"], document_text(row["title"], row["text"])

    def _scored(self, ranked: Sequence[Sequence[str]], settings: Settings) -> list[Scored]:
        values = retrieval_values(ranked, [_gains(example) for example in self.examples])
        ids = [example.id for example in self.examples]
        return [self._per_item(metric, ids, of_queries, settings) for metric, of_queries in values.items()]


def _gains(example: TrainingExample) -> dict[str, float]:
    """Judgement of each positive; one without a score above 0 (no judgement, or a teacher's logit) counts as 1."""
    return {item.id: item.score if item.score is not None and item.score > 0 else 1.0 for item in example.positives}


class LabelledSet(HeldOut):
    """Texts with classes."""

    def roles(self) -> Mapping[str, Callable[[], Iterator[Row]]]:
        return {"texts": lambda: ((row.id, row.query, self.prompt) for row in self.examples)}

    def score(self, vectors: Vectors, settings: Settings) -> list[Scored]:
        vector_ND = _rows_of(vectors("texts"), [row.id for row in self.examples])
        reference, test = self.halves()
        labels = [str(self.examples[index].label) for index in reference]
        predicted = knn_labels(vector_ND[test], vector_ND[reference], labels, settings.neighbours)
        return [self._accuracy(test, predicted, settings), self._v_measure(vector_ND, settings)]

    def score_bm25(self, settings: Settings) -> list[Scored]:
        reference, test = self.halves()
        texts = {self.examples[index].id: self.examples[index].query for index in reference}
        labels = {self.examples[index].id: str(self.examples[index].label) for index in reference}
        queries = [self.examples[index].query for index in test]
        ranked, scores = search_bm25(list(texts), list(texts.values()), queries, settings.neighbours)
        predicted = [
            vote([labels[key] for key in keys], row.tolist()) for keys, row in zip(ranked, scores, strict=True)
        ]
        return [self._accuracy(test, predicted, settings)]

    def halves(self) -> tuple[list[int], list[int]]:
        """Positions of the reference texts and of the test texts: of each class, by hash of the id, in turns.

        Raises:
            UserError: no class has two texts.
        """
        turns: dict[str | None, int] = {}
        halves: tuple[list[int], list[int]] = ([], [])
        for index in sorted(range(len(self.examples)), key=lambda index: _order(self.examples[index].id)):
            label = self.examples[index].label
            turns[label] = turns.get(label, -1) + 1
            halves[turns[label] % 2].append(index)
        if not halves[1]:
            raise UserError(f"data set {self.dataset}: no class of the split has two texts; k-NN needs some.")
        return halves

    def _accuracy(self, test: list[int], predicted: Sequence[str | None], settings: Settings) -> Scored:
        right = [float(self.examples[index].label == label) for index, label in zip(test, predicted, strict=True)]
        return self._per_item("accuracy", [self.examples[index].id for index in test], right, settings)

    def _v_measure(self, vector_ND: np.ndarray, settings: Settings) -> Scored:
        from sklearn.cluster import KMeans

        classes, label_N = np.unique([str(row.label) for row in self.examples], return_inverse=True)
        cluster_RN = np.stack(
            [
                KMeans(n_clusters=len(classes), n_init=1, random_state=settings.seed + run).fit_predict(vector_ND)
                for run in range(settings.clusterings)
            ]
        )
        return Scored("v_measure", bootstrap_v_measure(label_N, cluster_RN, settings.samples, settings.seed))


class GradedSet(HeldOut):
    """Pairs with a gold similarity; a pair is (query, text of its positive)."""

    def __init__(self, dataset: str, prompt: str, examples: list[TrainingExample], texts: Mapping[str, str]) -> None:
        super().__init__(dataset, prompt, examples)
        self._pairs = [(row.query, texts[row.positives[0].id]) for row in examples]
        self._gold = np.array([row.positives[0].score for row in examples], dtype=np.float64)

    def roles(self) -> Mapping[str, Callable[[], Iterator[Row]]]:
        return {"texts": lambda: ((_text_key(text), text, self.prompt) for text in self._texts())}

    def score(self, vectors: Vectors, settings: Settings) -> list[Scored]:
        a_ND, b_ND = (
            _rows_of(vectors("texts"), [_text_key(pair[place]) for pair in self._pairs]).astype(np.float64)
            for place in (0, 1)
        )
        return [self._spearman((a_ND * b_ND).sum(axis=1), settings)]

    def score_bm25(self, settings: Settings) -> list[Scored]:
        """The score of one text as a query for the other as a document, mean of both directions."""
        texts = self._texts()
        keys = [_text_key(text) for text in texts]
        partners: dict[str, set[str]] = {}
        for a, b in self._pairs:
            partners.setdefault(a, set()).add(b)
            partners.setdefault(b, set()).add(a)
        score_of_pair: dict[tuple[str, str], float] = {}
        for start in range(0, len(texts), _BM25_BLOCK):
            block = texts[start : start + _BM25_BLOCK]
            for query, ids, scores in zip(block, *search_bm25(keys, texts, block, len(texts)), strict=True):
                score_of = dict(zip(ids, scores.tolist(), strict=True))
                score_of_pair.update({(query, other): score_of.get(_text_key(other), 0.0) for other in partners[query]})
        return [
            self._spearman(
                np.array([(score_of_pair[a, b] + score_of_pair[b, a]) / 2 for a, b in self._pairs]), settings
            )
        ]

    def _texts(self) -> list[str]:
        return list(dict.fromkeys(text for pair in self._pairs for text in pair))

    def _spearman(self, value_N: np.ndarray, settings: Settings) -> Scored:
        statistic = spearman_statistic(value_N, self._gold)
        interval = bootstrap(statistic, len(value_N), settings.samples, settings.seed)
        ids = [example.id for example in self.examples]
        return Scored("spearman", interval, ids, value_N.tolist(), self._gold.tolist())


def load_held_out(
    prepare: Artifact, dataset: str, info: Mapping[str, Any], split: str, caps: Caps | None = None
) -> HeldOut | None:
    """The held-out examples of a data set; None if the split has none.

    Args:
        info: the data set's entry of `dataset_info`.
        caps: cut to a small comparison (classes and graded pairs by `queries`).
    """
    examples = read_examples(prepare, dataset, split)
    if caps is not None:
        examples = cap_examples(examples, caps.queries, caps.seed)
    if not examples:
        return None
    task, prompt, corpus = TaskType(info["task"]), info["instruction"], prepare.path(dataset, CORPUS)
    if task is TaskType.RETRIEVAL:
        keep = None if caps is None else _capped_corpus(corpus, examples, caps)
        return RetrievalSet(dataset, prompt, examples, corpus, keep)
    if task is TaskType.STS:
        table = read_table(corpus, ["id", "title", "text"])
        return GradedSet(
            dataset,
            prompt,
            examples,
            {row["id"]: document_text(row["title"], row["text"]) for row in table.to_pylist()},
        )
    return LabelledSet(dataset, prompt, examples)


def _capped_corpus(corpus_uri: str, examples: list[TrainingExample], caps: Caps) -> frozenset[str]:
    needed = {item.id for example in examples for item in example.positives}
    ids = (key for table in iter_parquet(corpus_uri, ["id"]) for key in table.column("id").to_pylist())
    others = (key for key in ids if key not in needed)
    room = max(0, caps.documents - len(needed))
    return frozenset(needed.union(heapq.nsmallest(room, others, key=lambda key: stable_hash(caps.seed, key))))


def prefix_vectors(
    shards: Iterator[tuple[list[str], np.ndarray]], dim: int | None
) -> Iterator[tuple[list[str], np.ndarray]]:
    """The first `dim` numbers of every vector, scaled to length 1 again; None passes the shards through."""
    for keys, matrix_ND in shards:
        yield keys, matrix_ND if dim is None else prefix_rows(matrix_ND, dim)


def _rows_of(shards: Iterator[tuple[list[str], np.ndarray]], wanted: Sequence[str]) -> np.ndarray:
    """float32 [N, D]: the vectors of `wanted`, in that order."""
    place: dict[str, int] = {}
    parts = []
    for keys, matrix_ND in shards:
        place.update({key: len(place) + offset for offset, key in enumerate(keys)})
        parts.append(matrix_ND)
    return np.concatenate(parts)[[place[key] for key in wanted]]


def _text_key(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _order(identifier: str) -> int:
    return stable_hash("halves", identifier)
