"""Unique texts and caps."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from nvembed.data.documents import Documents
from nvembed.data.fit import cap_examples, fit_corpus, unique_texts
from nvembed.data.sources.base import SourceRows
from nvembed.data.tables import Document
from nvembed.types import ScoredId, TaskType, TrainingExample


def retrieval(key: str, query: str, positives: list[str], negatives: list[str] | None = None) -> TrainingExample:
    return TrainingExample(
        key,
        "set",
        TaskType.RETRIEVAL,
        query,
        tuple(ScoredId(item) for item in positives),
        tuple(ScoredId(item) for item in negatives or []),
    )


def source(
    documents: list[Document], task: TaskType = TaskType.RETRIEVAL, **splits: list[TrainingExample]
) -> SourceRows:
    return SourceRows(task, "", "", Documents.of(documents), {"train": [], "dev": [], "test": [], **splits}, True)


def test_equal_documents_and_queries_become_one() -> None:
    documents = [
        Document("a", "", "same"),
        Document("b", "", "same"),
        Document("c", "", "other"),
        Document("e", "T", "same"),
    ]
    rows = source(
        documents,
        train=[retrieval("1", "q", ["a"]), retrieval("2", "q", ["c"], ["b", "e"]), retrieval("3", "r", ["c"], ["a"])],
    )
    unique_texts(rows)
    assert [row.id for row in rows.documents] == ["a", "c", "e"]
    assert rows.examples["train"] == [retrieval("1", "q", ["a", "c"], ["e"]), retrieval("3", "r", ["c"], ["a"])]


def test_a_query_in_several_splits_stays_in_the_most_held_out() -> None:
    documents = [Document(key, "", key) for key in "abc"]
    rows = source(
        documents,
        train=[retrieval("1", "q", ["a"]), retrieval("2", "r", ["a"]), retrieval("3", "s", ["a"])],
        dev=[retrieval("4", "q", ["b"]), retrieval("5", "r", ["b"])],
        test=[retrieval("6", "q", ["c"])],
    )
    unique_texts(rows)
    assert {split: [row.id for row in remaining] for split, remaining in rows.examples.items()} == {
        "train": ["3"],
        "dev": ["5"],
        "test": ["6"],
    }


def test_equal_classified_texts_keep_the_held_out_one() -> None:
    documents = [Document("1", "", "text", "x", "train"), Document("2", "", "text", "y", "test")]
    items = [TrainingExample(row.id, "set", TaskType.CLASSIFICATION, row.text, label=row.label) for row in documents]
    rows = source(documents, TaskType.CLASSIFICATION, train=items[:1], test=items[1:])
    unique_texts(rows)
    assert [row.id for row in rows.documents] == ["2"]
    assert not rows.examples["train"] and [row.id for row in rows.examples["test"]] == ["2"]


def test_caps_keep_classes_even_and_pairs_together() -> None:
    items = [
        TrainingExample(f"{label}{i}", "set", TaskType.CLASSIFICATION, f"{label} {i}", label=label)
        for label, count in (("a", 100), ("b", 10), ("c", 3))
        for i in range(count)
    ]
    assert Counter(row.label for row in cap_examples(items, 21, 0)) == {"a": 9, "b": 9, "c": 3}
    pairs = [
        TrainingExample(f"{a}~{b}", "set", TaskType.STS, str(a), (ScoredId(str(b), 0.5),))
        for i in range(50)
        for a, b in ((i, i + 100), (i + 100, i))
    ]
    remaining = {row.id for row in cap_examples(pairs, 20, 0)}
    assert len(remaining) == 20 and {"~".join(reversed(key.split("~"))) for key in remaining} == remaining


@given(st.integers(0, 40), st.integers(0, 50), st.integers(0, 3))
def test_a_smaller_cap_takes_a_prefix_and_file_order_does_not_matter(count: int, cap: int, seed: int) -> None:
    rows = [retrieval(str(i), f"q{i}", ["d"]) for i in range(count)]
    whole = cap_examples(rows, None, seed)
    assert cap_examples(rows[::-1], cap, seed) == whole[:cap]
    assert sorted(row.id for row in whole) == sorted(row.id for row in rows)


@given(st.integers(10, 60), st.integers(0, 3))
def test_the_corpus_cap(cap: int, seed: int) -> None:
    documents = [Document(f"d{i:02}", "", f"text {i}") for i in range(60)]
    train = [retrieval(f"t{i}", f"q{i}", [f"d{i:02}"], [f"d{i + 20:02}"]) for i in range(10, 30)]
    test = [retrieval(f"h{i}", f"h{i}", [f"d{i:02}", f"d{i + 1:02}"]) for i in range(0, 8, 2)]
    rows = source(documents, train=train, test=test)
    fit_corpus(rows, cap, seed)
    remaining = {row.id for row in rows.documents}
    assert len(remaining) == cap
    assert {item.id for row in test for item in row.positives} <= remaining
    assert len(rows.examples["test"]) == 4
    assert len(rows.examples["train"]) == min(20, cap - 8)
    for row in rows.examples["train"]:
        assert {item.id for item in (*row.positives, *row.negatives)} <= remaining
    if cap >= 48:
        assert all(row.negatives for row in rows.examples["train"])


def test_held_out_documents_stay_even_past_the_cap() -> None:
    documents = [Document(f"d{i}", "", f"text {i}") for i in range(20)]
    rows = source(documents, test=[retrieval(f"t{i}", f"q{i}", [f"d{i}"]) for i in range(15)])
    fit_corpus(rows, 10, 0)
    assert len(rows.documents) == 15


def test_items_without_an_example_leave_a_classified_corpus() -> None:
    documents = [Document(str(i), "", f"text {i}", "x", "train") for i in range(9)]
    items = [TrainingExample(str(i), "set", TaskType.CLASSIFICATION, f"text {i}", label="x") for i in range(4)]
    rows = source(documents, TaskType.CLASSIFICATION, train=items[:3], test=items[3:])
    fit_corpus(rows, None, 0)
    assert [row.id for row in rows.documents] == ["0", "1", "2", "3"]
