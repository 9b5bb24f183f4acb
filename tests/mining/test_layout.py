"""The texts of mining: which documents are positives, which are never negatives, which take part."""

import pytest
from artifacts import PreparedSet, publish_prepared

from nvembed.core.parquet import list_shards, read_table
from nvembed.data.tables import Document
from nvembed.mining.config import MineConfig
from nvembed.mining.layout import lay_out
from nvembed.types import ScoredId, TaskType, TrainingExample

CONFIG = MineConfig(sts_positive=0.8)


def artifact(tmp_path, task, documents, examples):
    return publish_prepared(tmp_path / "prepare", {"set": PreparedSet(task, documents, examples)})


def shards(tmp_path, prepare, dataset, task):
    info = {"task": task, "instruction": "Instruct: t\nQuery: "}
    result = lay_out(prepare, dataset, info, CONFIG, str(tmp_path / "texts"))
    tables = []
    for kind in ("queries", "documents"):
        root = f"{tmp_path}/texts/{kind}"
        tables.append([row for name in list_shards(root) for row in read_table(f"{root}/{name}").to_pylist()])
    return result, *tables


def example(key, query, positives, task=TaskType.RETRIEVAL, negatives=()):
    return TrainingExample(key, "set", task, query, tuple(ScoredId(*item) for item in positives), tuple(negatives))


def test_positives_of_the_same_query_text_are_shared(tmp_path):
    examples = [
        example("e1", "heap overflow", [("a",)]),
        example("e2", "Heap  overflow", [("b",), ("a",)]),
        example("e3", "injection", [("c",)], negatives=[ScoredId("d")]),
        example("e4", "nothing known", []),
    ]
    documents = [Document(key, "Title" if key == "a" else "", f"text {key}") for key in "abcd"]
    prepare = artifact(tmp_path, TaskType.RETRIEVAL, documents, examples)
    result, queries, texts = shards(tmp_path, prepare, "set", "retrieval")
    by_key = {row["key"]: row for row in queries}
    assert by_key["e1"]["positives"] == ["a", "b"] and by_key["e1"]["own"] == 1
    assert by_key["e2"]["positives"] == ["b", "a"] and by_key["e2"]["own"] == 2
    assert by_key["e1"]["never"] == by_key["e2"]["never"] == ["a", "b"]
    assert by_key["e3"]["never"] == ["c"] and by_key["e3"]["given"] == ["d"]
    assert "e4" not in by_key and result.dropped == {"without_positive": 1}
    assert (result.examples, result.queries, result.documents) == (4, 3, 4)
    assert texts[0]["text"] == "Title text a"
    assert {row["instruction"] for row in texts} == {""}
    assert {row["instruction"] for row in queries} == {"Instruct: t\nQuery: "}


def test_sts_takes_graded_pairs_and_only_train_texts(tmp_path):
    examples = [
        example("e1", "text a", [("b", 0.9)], TaskType.STS),
        example("e2", "text a", [("c", 0.6)], TaskType.STS),
        example("e3", "text a", [("d", 0.2)], TaskType.STS),
        example("e4", "text b", [("a", 0.9)], TaskType.STS),
    ]
    documents = [Document(key, "", f"text {key}", split="test" if key == "z" else "train") for key in "abcdz"]
    prepare = artifact(tmp_path, TaskType.STS, documents, examples)
    result, queries, texts = shards(tmp_path, prepare, "set", "sts")
    assert [row["key"] for row in queries] == ["e1", "e4"]
    assert queries[0]["positives"] == ["b"] and queries[0]["never"] == ["b", "c"]  # 0.6 is no positive, nor a negative
    assert result.dropped == {"graded_below_sts_positive": 2}
    assert [row["key"] for row in texts] == list("abcd")
    assert {row["instruction"] for row in texts} == {"Instruct: t\nQuery: "}


@pytest.mark.parametrize("count", [0, 3])
def test_equal_inputs_give_equal_bytes(tmp_path, count):
    examples = [example(f"e{index}", f"query {index}", [("a",)]) for index in range(count)]
    documents = [Document("a", "", "text a")]
    prepare = artifact(tmp_path, TaskType.RETRIEVAL, documents, examples)
    written = []
    for run in ("one", "two"):
        lay_out(prepare, "set", {"task": "retrieval", "instruction": ""}, CONFIG, str(tmp_path / run))
        written.append(
            {path.relative_to(tmp_path / run): path.read_bytes() for path in (tmp_path / run).rglob("*.parquet")}
        )
    assert written[0] == written[1]
    assert len(written[0]) == (count + 1 if count else 0)
