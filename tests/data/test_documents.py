"""Documents on disk: every decision about them equals the one over a plain list."""

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.core.parquet import write_tables
from nvembed.data.documents import Documents
from nvembed.data.fit import fit_corpus, merge_documents, unique_texts
from nvembed.data.prepare import mark_held_out_documents
from nvembed.data.sources.base import SourceRows
from nvembed.data.tables import CORPUS_SCHEMA, SPLITS, Document, document_text
from nvembed.text.identity import stable_hash
from nvembed.types import ScoredId, TaskType, TrainingExample

Rows = tuple[list[Document], dict[str, list[TrainingExample]]]

TEXTS = st.text("ab \0é😀", max_size=3)
DOCUMENTS = st.lists(
    st.builds(
        Document,
        st.text("xyzé😀", min_size=1, max_size=3),
        TEXTS,
        TEXTS,
        st.sampled_from([None, "one", "two"]),
        st.sampled_from([None, *SPLITS]),
    ),
    min_size=1,
    max_size=30,
    unique_by=lambda row: row.id,
)


@st.composite
def retrieval_sets(draw: st.DrawFn) -> Rows:
    documents = draw(DOCUMENTS)
    ids = st.lists(st.sampled_from([row.id for row in documents]), min_size=1, max_size=4).map(dict.fromkeys).map(list)
    examples: dict[str, list[TrainingExample]] = {split: [] for split in SPLITS}
    for number in range(draw(st.integers(0, 12))):
        chosen = draw(ids)
        cut = draw(st.integers(1, len(chosen)))
        row = TrainingExample(
            f"q{number}", "set", TaskType.RETRIEVAL, draw(st.sampled_from("abcdefgh")),
            tuple(map(ScoredId, chosen[:cut])), tuple(map(ScoredId, chosen[cut:])),
        )  # fmt: skip
        examples[draw(st.sampled_from(SPLITS))].append(row)
    return documents, examples


def source(rows: Rows) -> SourceRows:
    documents, examples = rows
    copies = {split: list(items) for split, items in examples.items()}
    return SourceRows(TaskType.RETRIEVAL, "", "", Documents.of(documents), copies, documents_split=False)


def plain_unique(documents: list[Document]) -> tuple[list[Document], dict[str, str]]:
    rank = {"test": 0, "dev": 1, "train": 2, None: 0}
    first: dict[tuple[str, str], str] = {}
    stands = {}
    for row in sorted(documents, key=lambda row: (rank[row.split], row.id)):
        stands[row.id] = first.setdefault((row.title, row.text), row.id)
    return sorted((row for row in documents if stands[row.id] == row.id), key=lambda row: row.id), stands


@given(retrieval_sets())
def test_equal_texts_become_one_as_in_a_list(rows: Rows) -> None:
    result = source(rows)
    unique_texts(result)
    documents, stands = plain_unique(rows[0])
    assert list(result.documents) == documents
    named = {item.id for split in SPLITS for row in rows[1][split] for item in row.positives}
    left = {item.id for split in SPLITS for row in result.examples[split] for item in row.positives}
    assert left <= {stands[key] for key in named}


@given(retrieval_sets(), st.integers(1, 30), st.integers(0, 3))
def test_the_cap_keeps_what_it_keeps_in_a_list(rows: Rows, cap: int, seed: int) -> None:
    result = source(rows)
    fit_corpus(result, cap, seed)
    remaining = {item.id for split in ("dev", "test") for row in rows[1][split] for item in row.positives}
    train = []
    for row in rows[1]["train"]:
        new = {item.id for item in row.positives} - remaining
        if len(remaining) + len(new) <= cap:
            remaining |= new
            train.append(row)
    negatives = dict.fromkeys(item.id for row in train for item in row.negatives if item.id not in remaining)
    remaining.update(list(negatives)[: max(0, cap - len(remaining))])
    rest = sorted((row.id for row in rows[0] if row.id not in remaining), key=lambda key: stable_hash(seed, key))
    remaining.update(rest[: max(0, cap - len(remaining))])
    assert list(result.documents) == [row for row in rows[0] if row.id in remaining]
    for split, items in {**rows[1], "train": train}.items():
        assert result.examples[split] == [
            dataclasses.replace(row, negatives=tuple(item for item in row.negatives if item.id in remaining))
            for row in items
        ]


@given(retrieval_sets())
def test_splits_of_documents_are_those_of_a_list(rows: Rows) -> None:
    result = source(rows)
    mark_held_out_documents(result)
    answers = {split: {item.id for row in rows[1][split] for item in row.positives} for split in SPLITS}
    expected = []
    for row in rows[0]:
        splits = [split for split in SPLITS if row.id in answers[split]]
        expected.append(dataclasses.replace(row, split=splits[-1] if splits and "train" not in splits else None))
    assert list(result.documents) == expected


@given(DOCUMENTS, st.data())
def test_choices_of_documents(rows: list[Document], data: st.DataObject) -> None:
    documents = Documents.of(rows)
    assert list(documents) == rows and len(documents) == len(rows)
    order = np.array(data.draw(st.permutations(range(len(rows)))), np.int64)
    rows, documents = [rows[place] for place in order], documents.taken(order)
    assert list(documents) == rows
    assert [rows[place] for place in documents.id_order()] == sorted(rows, key=lambda row: row.id)
    requested = data.draw(st.lists(st.text("xyzé😀", min_size=1, max_size=3)))
    assert documents.places(requested) == {row.id: place for place, row in enumerate(rows) if row.id in requested}
    texts = {row.id: document_text(row.title, row.text) for row in rows}
    assert list(documents.texts()) == list(texts.values())
    assert documents.texts_of(requested) == {key: texts[key] for key in texts if key in requested}
    assert documents.lengths().tolist() == [len(text) for text in texts.values()]
    assert list(documents.ids()) == list(texts)
    result = source((rows, {split: [] for split in SPLITS}))
    merge_documents(result, {row.id: "another" for row in rows if row.id in requested})
    assert list(result.documents) == [row for row in rows if row.id not in requested]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 12), st.integers(1, 30), st.data())
def test_pieces_are_as_long_as_they_may_be(sizes: list[int], rows: int, most: int, data: st.DataObject) -> None:
    """Whatever ends a record batch and a block: the rows in their order, no block over the limit but of one row."""
    texts = [f"{number}" * size for number, size in enumerate(sizes)]
    order = data.draw(st.permutations(range(len(sizes))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nvembed.data.documents._CHARACTERS", most)
        patch.setattr("nvembed.data.documents._BATCH_ROWS", rows)
        patch.setattr("nvembed.data.documents._BLOCK_ROWS", rows + 1)
        documents = Documents.of(Document(f"d{number}", "", text) for number, text in enumerate(texts))
        tables = list(documents.taken(np.array(order)).tables(7))
    assert [text for table in tables for text in table.column("text").to_pylist()] == [texts[i] for i in order]
    assert [table.num_rows for table in tables[:-1]] == [7] * (len(tables) - 1)
    for chunk in (chunk for table in tables for chunk in table.column("text").chunks):
        assert len(chunk) <= rows + 1 and (len(chunk) == 1 or sum(map(len, chunk.to_pylist())) <= most)


@given(st.lists(st.sampled_from("abc"), max_size=9))
def test_ids_that_come_again(ids: list[str]) -> None:
    expected = [key in ids[:place] for place, key in enumerate(ids)]
    assert Documents.of(Document(key, "", "text") for key in ids).repeated().tolist() == expected


@pytest.mark.parametrize("count", [1, 1024, 1025, 40_000])
def test_the_corpus_file_is_that_of_one_table(tmp_path: Path, count: int) -> None:
    """Byte for byte, as the hash of an evaluation set is taken of it."""
    rows = [
        Document(f"d{i}", f"title {i % 7}", f"text {i} " * (i % 50), "label" if i % 3 else None, SPLITS[i % 3])
        for i in range(count)
    ]
    write_tables(lambda: Documents.of(rows).tables(16384), CORPUS_SCHEMA, str(tmp_path / "corpus.parquet"))
    columns = {name: [getattr(row, name) for row in rows] for name in CORPUS_SCHEMA.names}
    whole = io.BytesIO()
    pq.write_table(pa.table(columns, schema=CORPUS_SCHEMA), whole, row_group_size=16384)
    assert (tmp_path / "corpus.parquet").read_bytes() == whole.getvalue()


GROWTH = """
import sys, threading, time
from nvembed.data.config import PrepareConfig
from nvembed.data.prepare import PREPARE

most = 0
def watch():
    global most
    while True:
        with open("/proc/self/status") as file:
            anonymous = next(line for line in file if line.startswith("RssAnon"))
        most = max(most, int(anonymous.split()[1]))
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
beir = {"type": "beir", "name": "set", "instruction": "web_search", "uri": sys.argv[1], "max_test": 50}
PREPARE.run(PrepareConfig(sources=(beir,)), {}, sys.argv[2])
print(most * 1024)
"""


def prepared_memory(folder: Path, documents: int) -> int:
    """Most anonymous memory of a process that prepares so many documents of 600 characters, 1,000 of them answers."""
    folder.mkdir()
    (folder / "qrels").mkdir()
    with (folder / "corpus.jsonl").open("w") as file:
        for i in range(documents):
            words = " ".join(f"w{(i * 7919 + j * j) % 100_003}" for j in range(100))
            file.write(f'{{"_id": "document-{i:012}", "title": "title {i}", "text": "{words}"}}\n')
    with (folder / "queries.jsonl").open("w") as file:
        file.writelines(f'{{"_id": "q{i}", "text": "question {i} of many"}}\n' for i in range(1000))
    for split, chosen in (("train", range(100, 1000)), ("test", range(100))):
        lines = "".join(f"q{i}\tdocument-{i:012}\t1\n" for i in chosen)
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    command = [sys.executable, "-c", GROWTH, str(folder), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_document_costs_little_memory(tmp_path: Path) -> None:
    """A list of them took 2.7 KB each; arrays of places, offsets and hashes take less than a tenth."""
    small, large = 400_000, 1_200_000  # below, other work of the step is the peak and hides what documents take
    growth = prepared_memory(tmp_path / "large", large) - prepared_memory(tmp_path / "small", small)
    print(f"{growth / (large - small):.0f} bytes of anonymous memory a document")
    assert growth / (large - small) < 250
