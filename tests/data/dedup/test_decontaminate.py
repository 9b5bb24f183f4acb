"""Near duplicates: planted ones are dropped, others are left alone."""

import random

from hypothesis import given
from hypothesis import strategies as st
from plain_shingles import shingles

from nvembed.data.config import NearDuplicateConfig
from nvembed.data.dedup.decontaminate import count_left, drop_near_duplicates, shared_documents
from nvembed.data.documents import Documents
from nvembed.data.sources.base import SourceRows
from nvembed.data.tables import Document
from nvembed.text.identity import jaccard
from nvembed.types import ScoredId, TaskType, TrainingExample

CONFIG = NearDuplicateConfig()
WORDS = [f"word{number}" for number in range(500)]


def sentence(seed: int, length: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def near_duplicate(text: str, seed: int) -> str:
    """One word of 60 replaced: Jaccard of 3-word shingles 55/61, over 0.8."""
    words = text.split()
    words[random.Random(seed).randrange(3, len(words) - 3)] = "other"
    return " ".join(words).upper()


def example(key: str, query: str, positive: str, negatives: tuple[str, ...] = ()) -> TrainingExample:
    negative_ids = tuple(ScoredId(item) for item in negatives)
    return TrainingExample(key, "set", TaskType.RETRIEVAL, query, (ScoredId(positive),), negative_ids)


def rows(documents_split: bool) -> SourceRows:
    """100 train examples: 10 near duplicates of test queries, 10 with positives near test positives, 80 others."""
    documents = [Document(f"test{i}", "", sentence(1000 + i)) for i in range(40)]
    test = [example(f"t{i}", sentence(i), f"test{i}") for i in range(40)]
    train = []
    for i in range(100):
        query = near_duplicate(sentence(i), i) if i < 10 else sentence(5000 + i)
        text = near_duplicate(sentence(1000 + i), i) if 10 <= i < 20 else sentence(9000 + i)
        documents.append(Document(f"train{i}", "", text))
        train.append(example(f"q{i}", query, f"train{i}", ("test3", "train50")))
    return SourceRows(
        TaskType.RETRIEVAL, "", "", Documents.of(documents), {"train": train, "dev": [], "test": test}, documents_split
    )


def test_planted_copies_are_dropped_and_nothing_else() -> None:
    data = rows(documents_split=True)
    assert drop_near_duplicates({"set": data}, CONFIG) == {"set": 20}
    assert [row.id for row in data.examples["train"]] == [f"q{i}" for i in range(20, 100)]
    assert len(data.examples["test"]) == 40
    assert count_left({"set": data}, CONFIG) == {"set": 0}


def test_copies_left_are_counted_when_nothing_was_dropped() -> None:
    assert count_left({"set": rows(documents_split=True)}, CONFIG) == {"set": 20}


def test_shared_corpora_compare_queries_only() -> None:
    data = rows(documents_split=False)
    assert drop_near_duplicates({"set": data}, CONFIG) == {"set": 10}
    data.examples["train"].append(example("shared", "a new query", "test3"))
    assert shared_documents(data) == 1


def test_given_negatives_that_are_held_out_positives_leave_training() -> None:
    data = rows(documents_split=True)
    drop_near_duplicates({"set": data}, CONFIG)
    assert {item.id for row in data.examples["train"] for item in row.negatives} == {"train50"}
    shared = rows(documents_split=False)
    drop_near_duplicates({"set": shared}, CONFIG)
    assert {item.id for row in shared.examples["train"] for item in row.negatives} == {"test3", "train50"}


def test_copies_are_found_across_data_sets() -> None:
    held_out, other = rows(documents_split=True), rows(documents_split=True)
    held_out.examples["train"] = []
    other.examples["test"] = [example("far", "nothing like any other", "train99")]
    assert drop_near_duplicates({"a": held_out, "b": other}, CONFIG)["b"] >= 20


def test_dev_loses_copies_of_test_and_train_those_of_dev() -> None:
    data = rows(documents_split=False)
    copied = near_duplicate(sentence(7), 3)
    data.examples["dev"] = [example("d0", copied, "train1"), example("d1", sentence(777), "train2")]
    data.examples["train"].append(example("late", near_duplicate(sentence(777), 5), "train3"))
    assert drop_near_duplicates({"set": data}, CONFIG) == {"set": 12}
    assert [row.id for row in data.examples["dev"]] == ["d1"]
    assert "late" not in {row.id for row in data.examples["train"]}


@given(st.text(max_size=80), st.text(max_size=80), st.integers(1, 4))
def test_jaccard_of_shingles(a: str, b: str, words: int) -> None:
    first, second = shingles(a, words), shingles(b, words)
    assert first and 0 <= jaccard(first, second) <= 1
    assert jaccard(first, second) == jaccard(second, first)
    assert (jaccard(first, second) == 1) == (first == second)


def test_queries_inside_other_texts_leave_too() -> None:
    """A test query inside a train document, a train query inside a test document; too short ones stay."""
    data = rows(documents_split=True)
    clean = drop_near_duplicates({"set": rows(documents_split=True)}, CONFIG)["set"]
    holds, holder = " ".join(sentence(30).split()[:9]), sentence(1035).split()
    data.examples["test"].append(example("inner", holds, "test39"))
    around = Document("around", "", f"before {sentence(30).upper()} after")
    data.documents = Documents.of([*data.documents, around])
    data.examples["train"] += [
        example("outer", "some other words of a query that nobody has", "around"),
        example("within", " ".join(holder[10:19]), "train50"),
        example("short", " ".join(holder[10:17]), "train51"),
    ]
    assert drop_near_duplicates({"set": data}, CONFIG, contained_words=8) == {"set": clean + 2}
    left = {row.id for row in data.examples["train"]}
    assert "short" in left and not {"outer", "within"} & left


def test_a_dev_example_that_leaves_takes_nothing_with_it() -> None:
    """Dev copies test and leaves; a train example that copied only the dev example stays."""
    data = rows(documents_split=False)
    copied = " ".join(sentence(888).split()[:30])
    data.examples["dev"] = [example("d", f"{copied} {sentence(3)}", "train2")]
    data.examples["test"] = [example("t", sentence(3), "test3")]
    data.examples["train"] = [example("copy", copied, "train1")]
    assert drop_near_duplicates({"set": data}, CONFIG, contained_words=8) == {"set": 1}
    assert data.examples["dev"] == [] and [row.id for row in data.examples["train"]] == ["copy"]
