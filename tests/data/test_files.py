"""Files people have: every format and shape, malformed rows, BEIR folders, and the way back."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.data.config import BeirSource, FilesSource, HubSource
from nvembed.data.sources import files
from nvembed.data.sources.base import RejectLog, SourceRows
from nvembed.data.sources.beir import read_beir
from nvembed.data.sources.files import read_file, read_files
from nvembed.data.sources.hub import read_hub
from nvembed.data.sources.rows import (
    MalformedRowError,
    PairRow,
    RawRow,
    good_rows,
    pairs_to_rows,
    parse_row,
    rows_of_records,
)
from nvembed.data.tables import Document
from nvembed.data.writers import (
    write_beir,
    write_flag_embedding,
    write_rows,
    write_sentence_transformers,
    write_tevatron,
)
from nvembed.types import ScoredId, TaskType, TrainingExample, UserError

ROWS = [
    {"anchor": f"question {i}", "positive": f"answer {i}", "negative_1": f"wrong {i}", "negative_2": f"bad {i}"}
    for i in range(120)
]


def read_pairs(raw_rows: Iterator[RawRow]) -> tuple[list[PairRow], RejectLog]:
    rejects = RejectLog()
    return list(good_rows(raw_rows, parse_row, rejects)), rejects


def files_source(*paths: Path, **options: object) -> FilesSource:
    return FilesSource(name="mine", instruction="web_search", uris=tuple(str(path) for path in paths), **options)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def content(rows: SourceRows) -> set[tuple]:
    """What a data set says, whatever its ids and splits: (query, positives, negatives) by text."""
    texts = {row.id: row.text for row in rows.documents}
    return {
        (
            row.query,
            frozenset(texts[item.id] for item in row.positives),
            frozenset(texts[item.id] for item in row.negatives),
        )
        for examples in rows.examples.values()
        for row in examples
    }


EXPECTED = {
    (row["anchor"], frozenset({row["positive"]}), frozenset({row["negative_1"], row["negative_2"]})) for row in ROWS
}


@pytest.mark.parametrize(
    "kind",
    [
        "jsonl",
        "jsonl.gz",
        "jsonl.zst",
        "csv",
        "tsv",
        "tsv.zst",
        "parquet",
        "flag.jsonl",
        "tevatron.jsonl",
        "glob",
        "folder",
    ],
)
def test_every_format_says_the_same(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_lines(path, ROWS)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif kind == "jsonl.zst":
        half = [("".join(json.dumps(row) + "\n" for row in rows)).encode() for rows in (ROWS[:50], ROWS[50:])]
        path.write_bytes(b"".join(pa.Codec("zstd").compress(part).to_pybytes() for part in half))  # two frames
    elif kind in ("csv", "tsv", "tsv.zst"):
        comma = "," if kind == "csv" else "\t"
        cells = [comma.join(f'"{value}"' for value in row.values()) for row in ROWS]
        data = ("\n".join([comma.join(ROWS[0]), *cells]) + "\n").encode()
        path.write_bytes(pa.Codec("zstd").compress(data).to_pybytes() if kind.endswith("zst") else data)
    elif kind == "tevatron.jsonl":
        rows = []
        for number, row in enumerate(ROWS):
            negatives = [{"docid": f"{number}-{name}", "title": "", "text": row[name]} for name in list(row)[2:]]
            positives = [{"docid": str(number), "title": "", "text": row["positive"]}]
            rows.append({"query_id": str(number), "query": row["anchor"], "positive_passages": positives})
            rows[-1]["negative_passages"] = negatives
        write_lines(path, rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "flag.jsonl":
        flag = [
            {"query": row["anchor"], "pos": [row["positive"]], "neg": [row["negative_1"], row["negative_2"]]}
            for row in ROWS
        ]
        write_lines(path, flag)
    else:  # glob, folder
        write_lines(tmp_path / "a1.jsonl", ROWS[:50])
        write_lines(tmp_path / "a2.jsonl", ROWS[50:])
        path = tmp_path / "a*.jsonl"
    if kind == "folder":
        (tmp_path / "README.txt").write_text("not data")
        path = tmp_path
    rows = read_files(files_source(path))
    assert content(rows) == EXPECTED
    assert all(rows.examples.values())
    assert rows.rejects.total == 0 and rows.rejects.rows == len(ROWS)


ODD = [
    "e\u0301 and \u00e9: never composed", "non-breaking\u00a0space, \u200bzero width", "  spaces   kept  ",
    "tabs\tand\nlines\r\nkept", "日本語と中文の混在 한국어", "العربية עברית", "Türkçe İstanbul ıI", "\ufeffBOM",
    "𝔘𝔫𝔦 🤖‍👩", "x" * 300_000,
]  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet"])
def test_texts_are_never_changed(tmp_path: Path, ending: str) -> None:
    """Code point by code point, in every format, through reading, preparing and writing back."""
    queries = [f"{text} {number}" for number in range(12) for text in ODD]
    rows = [{"anchor": query, "positive": "answer: " + query} for query in queries]
    first = read_files(files_source(write_lines(tmp_path / "rows.jsonl", rows)))
    everything = [row for examples in first.examples.values() for row in examples]
    assert {row.query for row in everything} == set(queries)
    write_sentence_transformers(first.documents, everything, str(tmp_path / f"back.{ending}"))
    again = read_files(files_source(tmp_path / f"back.{ending}"))
    assert content(again) == content(first)
    assert again.rejects.total == 0


def test_columns_of_another_name(tmp_path: Path) -> None:
    rows = [{"question": row["anchor"], "context": row["positive"], "positive": "no text of ours"} for row in ROWS]
    source = files_source(
        write_lines(tmp_path / "rows.jsonl", rows), columns={"query": "question", "positive": "context"}
    )
    assert content(read_files(source)) == {(query, positive, frozenset()) for query, positive, _ in EXPECTED}


def test_tevatron_round_trip_keeps_titles(tmp_path: Path) -> None:
    rows = [
        {
            "query_id": str(i), "query": f"q{i}",
            "positive_passages": [{"docid": "a", "title": f"Title {i}", "text": "the same text"}],
            "negative_passages": [{"docid": "b", "title": "", "text": f"n{i}"}, {"text": "the same text"}],
        }
        for i in range(99)
    ]  # fmt: skip
    first = read_files(files_source(write_lines(tmp_path / "rows.jsonl", rows)))
    titles = {(row.title, row.text) for row in first.documents}
    assert ("Title 7", "the same text") in titles and ("", "the same text") in titles
    everything = [row for examples in first.examples.values() for row in examples]
    write_tevatron(first.documents, everything, str(tmp_path / "back.jsonl"))
    again = read_files(files_source(tmp_path / "back.jsonl"))
    assert again.examples == first.examples and list(again.documents) == list(first.documents)
    bad = [{"query": "q", "positive_passages": [3]}, {"query": "q", "positive_passages": "p"}, {"query": "q"}]
    _, rejects = read_pairs(read_file(str(write_lines(tmp_path / "bad.jsonl", bad))))
    assert rejects.total == 3


def test_files_on_another_filesystem(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://bucket/rows.jsonl", "wb") as file:
        file.write(write_lines(tmp_path / "rows.jsonl", ROWS).read_bytes())
    source = FilesSource(name="mine", instruction="web_search", uris=("memory://bucket/*.jsonl",))
    assert content(read_files(source)) == EXPECTED


def test_scores_of_flag_embedding_are_kept(tmp_path: Path) -> None:
    flag = [
        {"query": f"q{i}", "pos": [f"p{i}"], "pos_scores": [0.9], "neg": [f"n{i}"], "neg_scores": [1]}
        for i in range(99)
    ]
    rows = read_files(files_source(write_lines(tmp_path / "rows.jsonl", flag)))
    for row in rows.examples["train"]:
        assert [item.score for item in (*row.positives, *row.negatives)] == [0.9, 1.0]


MALFORMED = [
    (b"{not json", "not JSON"),
    (b"\xff\xfe{}", "not UTF-8"),
    (b"[1, 2]", "not a JSON object"),
    (b'{"positive": "p"}', "query missing"),
    (b'{"anchor": "q"}', "positive missing"),
    (b'{"query": "q", "pos": []}', "positive missing"),
    (b'{"anchor": "  ", "positive": "p"}', "query empty"),
    (b'{"anchor": "q", "positive": ""}', "positive empty"),
    (b'{"anchor": 7, "positive": "p"}', "query is not text"),
    (b'{"anchor": "q", "positive": ["p"]}', "positive is not text"),
    (b'{"query": "q", "pos": "p"}', "positives are not a list"),
    (b'{"query": "q", "pos": ["p"], "neg": [null]}', "negative is not text"),
    (b'{"query": "q", "pos": ["p"], "pos_scores": [1, 2]}', "positive scores do not match the positives"),
    (b'{"query": "q", "pos": ["p"], "pos_scores": ["1"]}', "positive score is not a number"),
    (b'{"query": "q", "pos": ["p"], "pos_scores": [NaN]}', "positive score is not a number"),
    (
        f'{{"query": "q", "positive_passages": [{{"title": "{"t" * 1_000_001}", "text": "p"}}]}}'.encode(),
        "positive title is longer than 1,000,000 bytes",
    ),
    (b'{"anchor": "\\ud800", "positive": "p"}', "query is not UTF-8"),
    (f'{{"anchor": "q", "positive": "{"ö" * 500_001}"}}'.encode(), "positive is longer than 1,000,000 bytes"),
]


@pytest.mark.parametrize(("line", "reason"), MALFORMED, ids=[reason for _, reason in MALFORMED])
def test_malformed_lines_are_refused_by_reason_and_place(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(good + b"\n\n" + line + b"\n" + json.dumps(ROWS[1]).encode())
    rows, rejects = read_pairs(read_file(str(path)))
    assert [row.query for row in rows] == ["question 0", "question 1"]
    assert rejects.listed == [{"file": "rows.jsonl", "line": 3, "reason": reason}]
    assert rejects.rows == 3


def test_malformed_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'anchor,positive\nq1,"p\n1"\nq2,p2,extra\nq3\nq\xff4,p4\nq5,\nq6,p6\n')
    rows, rejects = read_pairs(read_file(str(path)))
    assert [row.query for row in rows] == ["q1", "q6"]
    assert [(row["line"], row["reason"]) for row in rejects.listed] == [
        (4, "more fields than the header"),
        (5, "positive missing"),
        (6, "query is not UTF-8"),
        (7, "positive empty"),
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.csv", b"text,label\na,b\n", "columns text, label"),
        ("rows.xlsx", b"", "unknown kind of file"),
        ("rows.parquet", b"PAR1 no", "not a parquet file"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_files(files_source(path))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_files(files_source(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="matches no file"):
        read_files(files_source(tmp_path / "*.jsonl"))


def test_two_texts_with_one_id_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated ones are no such thing."""
    rows = [{"anchor": f"q{i}", "positive": f"p{i}", "negative": "the same for all"} for i in range(50)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    assert len(read_files(files_source(path)).documents) == 51
    monkeypatch.setattr("nvembed.data.sources.rows.document_id", lambda title, text: f"d-{text[:2]}")
    with pytest.raises(UserError, match="two documents have the id d-p1"):
        read_files(files_source(path))


def test_rows_that_cannot_be_divided(tmp_path: Path) -> None:
    rows = [{"anchor": f"q{i}", "positive": "the same for all"} for i in range(50)]
    with pytest.raises(UserError, match="a split is empty"):
        read_files(files_source(write_lines(tmp_path / "rows.jsonl", rows)))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)), max_size=60))
def test_no_query_and_no_positive_is_in_two_splits(numbers: list[tuple[int, int, int]]) -> None:
    given = ({"anchor": f"q{q}", "positive": f"p{p}", "negative": f"p{n}"} for q, p, n in numbers)
    rows = pairs_to_rows(rows_of_records(given, "rows"), "mine", 0.3, "CC0-1.0")
    assert rows.licence == "CC0-1.0"
    splits_of: dict[str, set[str]] = {}
    for split, examples in rows.examples.items():
        for row in examples:
            for text in (row.query, *(item.id for item in row.positives)):
                splits_of.setdefault(text, set()).add(split)
            assert not {item.id for item in row.positives} & {item.id for item in row.negatives}
    assert all(len(result) == 1 for result in splits_of.values())
    assert {row.query for examples in rows.examples.values() for row in examples} == {f"q{q}" for q, _, _ in numbers}


# -- BEIR -------------------------------------------------------------------------------------------------------------


def beir_rows() -> tuple[list[Document], dict[str, list[TrainingExample]]]:
    documents = [Document(f"d{i}", f"Title {i}" if i % 2 else "", f"Text of {i}\nwith lines") for i in range(60)]
    examples: dict[str, list[TrainingExample]] = {"train": [], "dev": [], "test": []}
    for i in range(60):
        split = ("test", "dev", "train")[min(i // 10, 2)]
        positives = (ScoredId(f"d{i}", 1.0), ScoredId(f"d{(i + 1) % 60}", 2.0))
        negatives = (ScoredId(f"d{(i + 5) % 60}", 0.0),)
        examples[split].append(
            TrainingExample(f"q{i}", "mine", TaskType.RETRIEVAL, f"query é {i}", positives, negatives)
        )
    return documents, examples


def test_beir_round_trip(tmp_path: Path) -> None:
    documents, examples = beir_rows()
    write_beir(documents, examples, str(tmp_path / "folder"))
    rows = read_beir(BeirSource(name="mine", instruction="web_search", uri=str(tmp_path / "folder")))
    assert list(rows.documents) == documents
    assert rows.examples == examples
    assert not rows.documents_split and rows.rejects.total == 0


def test_beir_without_dev_and_train(tmp_path: Path) -> None:
    documents, examples = beir_rows()
    source = BeirSource(name="mine", instruction="web_search", uri=str(tmp_path))
    write_beir(documents, {"train": examples["train"], "test": examples["test"]}, source.uri)
    rows = read_beir(source)
    assert 0 < len(rows.examples["dev"]) < len(rows.examples["train"])
    (tmp_path / "qrels" / "train.tsv").unlink()
    assert not read_beir(source).examples["train"]
    (tmp_path / "qrels" / "test.tsv").unlink()
    with pytest.raises(UserError, match=r"needs qrels/test\.tsv"):
        read_beir(source)


def test_beir_splits_grades_and_shapes(tmp_path: Path) -> None:
    """Several files join one split; TREC's four fields and jsonl count too; grades stay."""
    documents, examples = beir_rows()
    write_beir(documents, examples, str(tmp_path))
    (tmp_path / "qrels" / "hard.tsv").write_text("q20\t0\td3\t3\nq21\t0\td4\t0\n")
    (tmp_path / "qrels" / "more.jsonl").write_text('{"query-id": "q22", "corpus-id": "d9", "score": 2}\n')
    plain = (tmp_path / "corpus.jsonl").read_bytes()
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "corpus.jsonl").unlink()
    source = BeirSource(
        name="mine", instruction="web_search", uri=str(tmp_path),
        qrels={"train": ("train",), "dev": ("dev",), "test": ("hard", "more")},
    )  # fmt: skip
    rows = read_beir(source)
    assert list(rows.documents) == documents and rows.examples["dev"] == examples["dev"]
    assert {row.id: row.positives for row in rows.examples["test"]} == {
        "q20": (ScoredId("d3", 3.0),), "q22": (ScoredId("d9", 2.0),),
    }  # fmt: skip
    assert {row.id for row in examples["train"]} - {row.id for row in rows.examples["train"]} == {"q20", "q22"}
    with pytest.raises(UserError, match=r"qrels/none\.tsv: no such file"):
        read_beir(source.model_copy(update={"qrels": {"test": ("none",)}}))


def test_beir_rejects(tmp_path: Path) -> None:
    documents, examples = beir_rows()
    write_beir(documents, examples, str(tmp_path))
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d0", "text": "again"}\n{"text": "no id"}\n{"_id": "e", "text": " "}\n{"_id": "f"}\n')
        file.write(json.dumps({"_id": "g", "text": "x" * 1_000_001}) + "\n")
    with (tmp_path / "qrels" / "test.tsv").open("a") as file:
        file.write("q0\tunknown\t1\nq999\td1\t1\nq1\td1\tmany\nq1\td1\t\u00b2\nq1\td1\t--1\nq1\td1\tnan\nq1 d1 1\n")
    rows = read_beir(BeirSource(name="mine", instruction="web_search", uri=str(tmp_path)))
    assert rows.rejects.by_reason == {
        "_id twice": 1,
        "_id missing or not text": 1,
        "text empty": 1,
        "text missing or not text": 1,
        "longer than 1,000,000 bytes": 1,
        "unknown document": 1,
        "unknown query": 1,
        "score is not a number": 4,
        "not three fields": 1,
    }
    assert rows.examples == examples


# -- and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_sentence_transformers, write_flag_embedding])
def test_pairs_round_trip(tmp_path: Path, write) -> None:
    first = read_files(files_source(write_lines(tmp_path / "rows.jsonl", ROWS)))
    everything = [row for examples in first.examples.values() for row in examples]
    write(first.documents, everything, str(tmp_path / "back.jsonl"))
    again = read_files(files_source(tmp_path / "back.jsonl"))
    assert content(again) == content(first) == EXPECTED
    for split, examples in first.examples.items():
        assert {row.id for row in again.examples[split]} == {row.id for row in examples}


def test_several_positives_and_scores_round_trip(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "pos": [f"a{i}", f"b{i}"], "neg": [], "pos_scores": [0.5, 1.0]} for i in range(99)]
    first = read_files(files_source(write_lines(tmp_path / "rows.jsonl", rows)))
    everything = [row for examples in first.examples.values() for row in examples]
    write_flag_embedding(first.documents, everything, str(tmp_path / "flag.jsonl"))
    again = read_files(files_source(tmp_path / "flag.jsonl"))
    assert {row.id: row for row in again.examples["train"]} == {row.id: row for row in first.examples["train"]}
    write_sentence_transformers(first.documents, everything, str(tmp_path / "st.jsonl"))
    assert content(read_files(files_source(tmp_path / "st.jsonl"))) == content(first)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"anchor": "a", "positive": "b"}
        raise RuntimeError("half-way")

    for name in ("a.jsonl", "a.csv.gz", "a.jsonl.zst", "a.parquet"):
        with pytest.raises(RuntimeError, match="half-way"):
            write_rows(rows(), str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="a list has no place in csv"):
        write_rows([{"query": "q", "pos": ["a"]}], str(tmp_path / "a.csv"))


def test_only_retrieval_is_written_back(tmp_path: Path) -> None:
    row = TrainingExample("a", "mine", TaskType.CLASSIFICATION, "text", label="class")
    with pytest.raises(UserError, match="classification"):
        write_flag_embedding([], [row], str(tmp_path / "no.jsonl"))


def test_hub_reads_a_folder_that_datasets_can_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", ROWS)
    rows = read_hub(HubSource(name="mine", instruction="web_search", path=str(folder)))
    assert content(rows) == EXPECTED
    with pytest.raises(UserError, match="cannot be loaded"):
        read_hub(HubSource(name="mine", instruction="web_search", path=str(folder), split="nowhere"))


def test_the_querys_own_text_is_neither_its_positive_nor_its_negative() -> None:
    row = parse_row(
        {"query": "A heap  overflow", "positive": "CWE-122", "negative": "a heap overflow", "negative_1": "b"}
    )
    assert [item.text for item in row.negatives] == ["b"]
    row = parse_row({"query": "q", "pos": ["Q ", "other"], "neg": ["q", "n"]})
    assert [item.text for item in row.positives] == ["other"] and [item.text for item in row.negatives] == ["n"]
    with pytest.raises(MalformedRowError, match="the positive is the query's own text"):
        parse_row({"anchor": "same text", "positive": "Same  text"})
    titled = [{"title": "t", "text": "q"}]  # a title makes another text of it
    assert len(parse_row({"query": "q", "positive_passages": titled}).positives) == 1


def delimited(tmp_path: Path, name: str, content: bytes) -> tuple[list[PairRow], RejectLog]:
    (tmp_path / name).write_bytes(content)
    rejects = RejectLog()
    return list(good_rows(read_file(str(tmp_path / name)), parse_row, rejects)), rejects


@pytest.mark.parametrize("name", ["x.tsv", "x.csv"])
def test_an_unbalanced_quote_costs_one_row_at_most(tmp_path: Path, name: str) -> None:
    sign = "\t" if name.endswith("tsv") else ","
    lines = [f"q{index}{sign}p{index}" for index in range(200)]
    lines[20], lines[120], lines[121] = f'"open{sign}p', f'5" pipe{sign}p', f'a{sign}"b'
    lines[50], lines[60] = f'"a ""quoted"" word"{sign}p', f'q{sign}"two\r\nlines"'
    rows, rejects = delimited(tmp_path, name, "\n".join([f"query{sign}positive", *lines, ""]).encode())
    faults = {"x.tsv": 0, "x.csv": 2}[name]
    assert len(rows) == 200 - faults and rejects.total == faults and rejects.rows == 200
    by_query = {row.query: row.positives[0].text for row in rows}
    assert by_query['a "quoted" word'] == "p" and by_query["q"] == "two\r\nlines" and by_query['5" pipe'] == "p"
    if not faults:
        assert by_query['"open'] == "p" and by_query["a"] == '"b'


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tsv"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, name: str) -> None:
    text = {
        "x.jsonl": '{"query": "q", "positive": "p"}\n',
        "x.csv": "query,positive\nq,p\n",
        "x.tsv": "query\tpositive\nq\tp\n",
    }[name]
    rows, rejects = delimited(tmp_path, name, b"\xef\xbb\xbf" + text.encode())
    assert len(rows) == 1 and not rejects.total
    with pytest.raises(UserError, match=r"is UTF-16 or UTF-32\. Convert it: iconv"):
        delimited(tmp_path, name, text.encode("utf-16"))


def test_columns_of_one_name_and_hidden_files_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its first line, the header, is a quote that is not closed"):
        list(read_file_of_pairs(tmp_path, b'query,"positive\nq,p\n'))
    with pytest.raises(UserError, match="two columns called positive"):
        list(read_file_of_pairs(tmp_path, b"query,positive,positive\nq,p,r\n"))
    folder = tmp_path / "data 50%20 [x]"
    (folder / "_temporary").mkdir(parents=True)
    for place in ("a.jsonl", ".b.jsonl", "_temporary/c.jsonl", "_metadata.json"):
        (folder / place).write_text('{"query": "q", "positive": "p"}\n')
    assert files._expand(str(folder)) == [str(folder / "a.jsonl")]
    assert files._expand(str(folder / "a.jsonl")) == [str(folder / "a.jsonl")]


def read_file_of_pairs(tmp_path: Path, content: bytes) -> Iterator[RawRow]:
    (tmp_path / "pairs.csv").write_bytes(content)
    config = FilesSource(name="x", instruction="cwe", uris=(str(tmp_path / "pairs.csv"),))
    return read_file(config.uris[0], files.column_check(config))


def test_an_empty_split_names_the_malformed_rows_first(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"query": "q", "positive": "p"}\n' + 9 * '{"query": "q"}\n')
    with pytest.raises(UserError, match=r"a split is empty .* 9 of 10 rows are malformed \(9 x positive missing\)"):
        read_files(FilesSource(name="x", instruction="cwe", uris=(str(tmp_path / "x.jsonl"),)))
