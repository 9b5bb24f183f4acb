"""Held-out sets: which texts get vectors and in which form, and scores from vectors made by hand."""

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from nvembed.data.tables import dataset_info, read_corpus, read_examples
from nvembed.evaluation.run import load_sets
from nvembed.evaluation.tasks import (
    Caps,
    GradedSet,
    HeldOut,
    LabelledSet,
    RetrievalSet,
    Settings,
    Vectors,
    load_held_out,
    prefix_vectors,
)
from nvembed.types import Artifact

SETTINGS = Settings(samples=200, seed=1, neighbours=3, clusterings=2)


def held_out(prepare: Artifact, dataset: str, split: str = "test", caps: Caps | None = None) -> HeldOut:
    found = load_held_out(prepare, dataset, dataset_info(prepare)[dataset], split, caps)
    assert found is not None
    return found


def rows_of(found: HeldOut, role: str) -> list[tuple[str, str, str]]:
    return list(found.roles()[role]())


def made_of(found: HeldOut, vector: Callable[[str, str], np.ndarray]) -> Vectors:
    """Unit vectors by (key, text), in shards of seven."""

    def vectors(role: str) -> Iterator[tuple[list[str], np.ndarray]]:
        rows = rows_of(found, role)
        for start in range(0, len(rows), 7):
            part = rows[start : start + 7]
            matrix = np.stack([vector(key, text) for key, text, _ in part]).astype(np.float32)
            yield [key for key, _, _ in part], matrix / np.linalg.norm(matrix, axis=1, keepdims=True)

    return vectors


def bag(key: str, text: str) -> np.ndarray:
    """A vector that knows the words of a text."""
    vector = np.full(512, 1e-3)
    for word in text.split():
        vector[sum(map(ord, word)) % 512] += 1
    return vector


def test_retrieval_texts(prepare: Artifact) -> None:
    found = held_out(prepare, "links")
    corpus, examples = read_corpus(prepare, "links").to_pylist(), read_examples(prepare, "links", "test")
    assert isinstance(found, RetrievalSet)
    assert rows_of(found, "queries") == [(row.id, row.query, "Instruct: find links\nQuery: ") for row in examples]
    documents = rows_of(found, "documents")
    assert len(documents) == len(corpus) == 40  # the whole corpus, bare
    assert {instruction for _, _, instruction in documents} == {""}
    assert documents[1][1] == f"{corpus[1]['title']} {corpus[1]['text']}"


def test_retrieval_scores_by_hand(prepare: Artifact) -> None:
    found = held_out(prepare, "links")
    order = {row["id"]: index for index, row in enumerate(read_corpus(prepare, "links").to_pylist())}
    right = {row.id: order[row.positives[0].id] for row in found.examples}

    def first_at(rank: int) -> Vectors:
        """Every query finds its first positive at `rank`, the document after it one place later, and so on."""

        def vector(key: str, text: str) -> np.ndarray:
            if key in order:
                return np.eye(40)[order[key]]
            return np.array([1.0 / (1 + (place - right[key] + rank - 1) % 40) for place in range(40)])

        return made_of(found, vector)

    scores = {row.metric: row for row in found.score(first_at(1), SETTINGS)}
    assert list(scores) == ["ndcg_at_10", "recall_at_100", "mrr_at_10"]
    assert scores["recall_at_100"].interval["value"] == 1.0  # 40 documents
    single = [len(row.positives) == 1 for row in found.examples]
    for rank in (1, 2, 11):
        rows = {row.metric: row for row in found.score(first_at(rank), SETTINGS)}
        mrr = [value for value, one in zip(rows["mrr_at_10"].values, single, strict=True) if one]
        assert mrr == [pytest.approx(1 / rank if rank <= 10 else 0)] * sum(single)
        ndcg = [value for value, one in zip(rows["ndcg_at_10"].values, single, strict=True) if one]
        assert ndcg == [pytest.approx(1 / np.log2(rank + 1) if rank <= 10 else 0)] * sum(single)
    # graded: the second positive counts double and comes second: (1 + 2 / log2(3)) / (2 + 1 / log2(3))
    graded = [value for value, one in zip(scores["ndcg_at_10"].values, single, strict=True) if not one]
    assert graded and graded == [pytest.approx((1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3)))] * len(graded)
    assert scores["ndcg_at_10"].item_ids == [row.id for row in found.examples]


def test_bm25_finds_shared_words(prepare: Artifact) -> None:
    for dataset, metric, least in (
        ("links", "ndcg_at_10", 0.5),
        ("kinds", "accuracy", 0.9),
        ("pairs", "spearman", 0.5),
    ):
        scores = {row.metric: row.interval for row in held_out(prepare, dataset).score_bm25(SETTINGS)}
        assert scores[metric]["value"] > least
        assert "v_measure" not in scores  # nothing to cluster


def test_halves_are_even_in_every_class_and_do_not_overlap(prepare: Artifact) -> None:
    found = held_out(prepare, "kinds")
    assert isinstance(found, LabelledSet)
    reference, test = found.halves()
    assert sorted(reference + test) == list(range(30))
    for half in (reference, test):
        assert Counter(found.examples[index].label for index in half) == dict.fromkeys(
            {row.label for row in found.examples}, 5
        )
    assert found.halves() == (reference, test)
    assert reference != sorted(reference)  # by hash, not by place


def test_class_scores(prepare: Artifact) -> None:
    found = held_out(prepare, "kinds")
    assert {row[2] for row in rows_of(found, "texts")} == {"Instruct: find kinds\nQuery: "}
    labels = sorted({str(row.label) for row in found.examples})
    of_class = {row.id: labels.index(str(row.label)) for row in found.examples}
    good = {row.metric: row for row in found.score(made_of(found, lambda key, _: np.eye(3)[of_class[key]]), SETTINGS)}
    assert list(good) == ["accuracy", "v_measure"]
    assert good["accuracy"].interval["value"] == good["v_measure"].interval["value"] == pytest.approx(1.0)
    assert len(good["accuracy"].item_ids) == 15 and not good["v_measure"].item_ids
    generator = np.random.default_rng(0)
    bad = {row.metric: row for row in found.score(made_of(found, lambda *_: generator.normal(size=8)), SETTINGS)}
    assert bad["accuracy"].interval["value"] < 0.8 and bad["v_measure"].interval["value"] < 0.5


def test_pair_scores(prepare: Artifact) -> None:
    found = held_out(prepare, "pairs")
    assert isinstance(found, GradedSet)
    rows = rows_of(found, "texts")
    texts = [text for _, text, _ in rows]
    examples, corpus = read_examples(prepare, "pairs", "test"), read_corpus(prepare, "pairs").to_pylist()
    second = {row["id"]: row["text"] for row in corpus}
    wanted = {row.query for row in examples} | {second[row.positives[0].id] for row in examples}
    assert set(texts) == wanted and len(texts) == len(wanted) == len({key for key, _, _ in rows})
    assert {instruction for _, _, instruction in rows} == {"Instruct: find pairs\nQuery: "}  # both sides
    (scored,) = found.score(made_of(found, bag), SETTINGS)
    assert scored.metric == "spearman" and scored.gold == [row.positives[0].score for row in examples]
    first = examples[3]
    a, b = bag("", first.query), bag("", second[first.positives[0].id])
    assert scored.values[3] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    assert scored.interval["value"] > 0.8


def test_caps_keep_what_queries_need(prepare: Artifact) -> None:
    caps = Caps(documents=12, queries=4, seed=5)
    found = held_out(prepare, "links", "dev", caps)
    ids = {key for key, _, _ in rows_of(found, "documents")}
    assert len(found.examples) == 4 and len(ids) == 12
    assert {item.id for row in found.examples for item in row.positives} <= ids
    again = held_out(prepare, "links", "dev", caps)
    assert rows_of(again, "documents") == rows_of(found, "documents") and again.examples == found.examples
    classes = held_out(prepare, "kinds", "dev", Caps(12, 6, 5))
    assert Counter(row.label for row in classes.examples) == dict.fromkeys({row.label for row in classes.examples}, 2)


def test_sets_hold_the_examples_of_their_split(prepare: Artifact) -> None:
    for split in ("dev", "test"):
        for found in load_sets(prepare, split):
            assert {row.id for row in found.examples} == {
                row.id for row in read_examples(prepare, found.dataset, split)
            }


def test_prefix_vectors_are_unit_prefixes() -> None:
    matrix = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    ((_, cut),) = prefix_vectors(iter([(["a"] * 5, matrix)]), 3)
    assert cut.shape == (5, 3) and cut.dtype == np.float32
    assert np.linalg.norm(cut, axis=1) == pytest.approx(1)
    assert cut[2] == pytest.approx(matrix[2, :3] / np.linalg.norm(matrix[2, :3]))
    ((_, whole),) = prefix_vectors(iter([(["a"] * 5, matrix)]), None)
    assert whole is matrix
