"""The five quickstart sources, read from their real packages."""

import ast
import importlib.metadata
import textwrap

import pytest

from nvembed.data.config import (
    CweSource,
    HpoClassesSource,
    HpoRetrievalSource,
    HpoSimilaritySource,
    StdlibCodeSource,
)
from nvembed.data.sources import base
from nvembed.data.sources.base import SourceRows
from nvembed.data.sources.cwe import read_cwe
from nvembed.data.sources.hpo import MIN_CLASS_MEMBERS, read_hpo_classes, read_hpo_retrieval, read_hpo_similarity
from nvembed.data.sources.ontology import DEV_BRANCHES, ROOT, TEST_BRANCHES, load_ontology
from nvembed.data.sources.stdlib_code import _documented_functions, read_stdlib_code
from nvembed.types import UserError

READERS = {
    "cwe": (read_cwe, CweSource),
    "hpo_retrieval": (read_hpo_retrieval, HpoRetrievalSource),
    "hpo_classes": (read_hpo_classes, HpoClassesSource),
    "hpo_similarity": (read_hpo_similarity, HpoSimilaritySource),
    "stdlib_code": (read_stdlib_code, StdlibCodeSource),
}


@pytest.fixture(scope="module")
def sources() -> dict[str, SourceRows]:
    return {name: reader(kind(name=name, instruction=name)) for name, (reader, kind) in READERS.items()}


def test_every_split_of_every_set_is_large_enough(sources: dict[str, SourceRows]) -> None:
    for name, rows in sources.items():
        counts = {split: len(examples) for split, examples in rows.examples.items()}
        assert counts["test"] >= 300 and counts["dev"] >= 200 and counts["train"] >= 1400, (name, counts)
        held_out = (counts["test"] + counts["dev"]) / sum(counts.values())
        assert 0.1 < held_out < 0.35, (name, counts)


def test_every_positive_is_in_the_corpus_and_ids_are_unique(sources: dict[str, SourceRows]) -> None:
    for name, rows in sources.items():
        ids = [document.id for document in rows.documents]
        assert len(ids) == len(set(ids)), name
        wanted = {item.id for examples in rows.examples.values() for row in examples for item in row.positives}
        assert wanted <= set(ids), name
        examples = [row.id for split in rows.examples.values() for row in split]
        assert len(examples) == len(set(examples)), name


def test_cwe_keeps_all_descriptions_of_a_cve_in_one_split(sources: dict[str, SourceRows]) -> None:
    rows = sources["cwe"]
    assert len(rows.documents) == 938
    splits_of: dict[str, set[str]] = {}
    for split, examples in rows.examples.items():
        for row in examples:
            splits_of.setdefault(row.id.split("#")[0], set()).add(split)
    assert len(splits_of) > 2000
    assert all(len(result) == 1 for result in splits_of.values())


def test_one_assignment_of_phenotypes_to_splits_serves_all_hpo_sets(sources: dict[str, SourceRows]) -> None:
    ontology = load_ontology()
    splits_of: dict[str, set[str]] = {}
    for name in ("hpo_retrieval", "hpo_classes", "hpo_similarity"):
        for split, examples in sources[name].examples.items():
            for row in examples:
                touched = {row.id.split("/")[0]} if name != "hpo_similarity" else set(row.id.split("~"))
                for term in touched | {item.id for item in row.positives}:
                    splits_of.setdefault(term, set()).add(split)
    assert len(splits_of) > 10_000
    assert all(len(result) == 1 for result in splits_of.values())
    held_out = {term for term, result in splits_of.items() if result == {"test"}}
    assert held_out
    for term in held_out:
        assert (ontology.ancestors[term] | {term}) & set(TEST_BRANCHES)
    for term, result in splits_of.items():
        if result == {"train"}:
            assert not (ontology.ancestors[term] | {term}) & set(TEST_BRANCHES + DEV_BRANCHES)


def test_held_out_classes_never_occur_in_training(sources: dict[str, SourceRows]) -> None:
    labels = {split: [row.label for row in rows] for split, rows in sources["hpo_classes"].examples.items()}
    assert not set(labels["train"]) & (set(labels["test"]) | set(labels["dev"]))
    assert not set(labels["dev"]) & set(labels["test"])
    for split in labels.values():
        assert min(split.count(label) for label in set(split)) >= MIN_CLASS_MEMBERS
    texts = {row.id: row.text for row in sources["hpo_classes"].documents}
    assert all(texts[row.id] == row.query for rows in sources["hpo_classes"].examples.values() for row in rows)


def test_ontology_measure() -> None:
    ontology = load_ontology()
    seizure, motor_seizure, eye = "HP:0001250", "HP:0020219", "HP:0000478"
    assert seizure in ontology.parents[motor_seizure]
    assert ontology.depth[ROOT] == 1 and ontology.depth[eye] == 2
    assert ontology.similarity(seizure, seizure) == 1
    assert ontology.similarity(seizure, motor_seizure) == ontology.similarity(motor_seizure, seizure)
    expected = 2 * ontology.depth[seizure] / (ontology.depth[seizure] + ontology.depth[motor_seizure])
    assert ontology.similarity(seizure, motor_seizure) == pytest.approx(expected)
    assert ontology.similarity(seizure, eye) == pytest.approx(2 / (ontology.depth[seizure] + 2))


def test_similarity_is_graded_synthetic_and_trained_in_both_directions(sources: dict[str, SourceRows]) -> None:
    rows = sources["hpo_similarity"]
    assert rows.synthetic
    for split, examples in rows.examples.items():
        scores = [row.positives[0].score or 0 for row in examples]
        assert min(scores) > 0 and max(scores) < 1
        shares = [sum(low / 10 <= score < (low + 2) / 10 for score in scores) / len(scores) for low in range(0, 10, 2)]
        assert min(shares) > 0.1, (split, shares)
    train = {row.id for row in rows.examples["train"]}
    assert all("~".join(reversed(key.split("~"))) in train for key in train)
    held_out = {row.id for row in rows.examples["test"]}
    assert not any("~".join(reversed(key.split("~"))) in held_out for key in held_out)


def test_code_documents_hold_no_docstring(sources: dict[str, SourceRows]) -> None:
    rows = sources["stdlib_code"]
    modules: dict[str, set[str]] = {}
    for split, examples in rows.examples.items():
        for row in examples:
            modules.setdefault(row.id.split(":")[0].split("/")[0], set()).add(split)
    assert all(len(result) == 1 for result in modules.values())
    assert not {"test", "site-packages"} & set(modules)
    parsed = 0
    for document in list(rows.documents)[::7]:
        try:
            tree = ast.parse(document.text)
        except SyntaxError:  # dedenting text inside a multi-line string can break it; the text is only ever embedded
            continue
        parsed += 1
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                assert ast.get_docstring(node) is None, document.id
    assert parsed > 0.95 * len(list(rows.documents)[::7])


def test_code_without_docstrings_of_inner_definitions(tmp_path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        textwrap.dedent('''
        def outer(a):
            """Say what the outer one does.

            More.
            """
            def inner():
                """The inner one says more here."""
                return a
            class Kept:
                "Short text of a class."
                size = 1
            return inner

        def stub(a):
            """Not implemented by this class at all."""
            raise NotImplementedError

        def one_line(a): "a docstring beside the code"; return a
        ''')
    )
    result = list(_documented_functions(path))
    assert [(name, query) for name, _, query, _ in result] == [
        ("outer", "Say what the outer one does."),
        ("inner", "The inner one says more here."),
    ]
    expected = "def outer(a):\n    def inner():\n        return a\n    class Kept:\n        size = 1\n    return inner"
    assert result[0][3] == expected


def test_missing_package_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(base.importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match=r"cwe2.*pip install 'nvembed\[quickstart\]'"):
        read_cwe(CweSource(name="cwe", instruction="cwe"))
