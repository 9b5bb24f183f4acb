"""The steps that make model folders without training, on a small prepare artifact."""

import numpy as np
import pytest
from artifacts import PreparedSet, publish_prepared

from nvembed.core.steps import load_artifact
from nvembed.data.tables import SPLITS, Document
from nvembed.modeling.config import (
    EmbedderConfig,
    InitialiseConfig,
    LatentAttentionConfig,
    MeanConfig,
    RandomBackbone,
    TruncateConfig,
)
from nvembed.modeling.folder import describe_folder, load_embedder
from nvembed.training.initialise import INITIALISE, STUDENT_INIT, dataset_prompts, tokenizer_texts
from nvembed.types import TaskType, TrainingExample, UserError

CONFIG = InitialiseConfig(
    backbone=RandomBackbone(vocab_size=320, num_layers=3),
    embedder=EmbedderConfig(pooling=LatentAttentionConfig(num_latents=8, num_heads=4)),
    seed=3,
)
TEXTS = ["a heap overflow", "lists", "?"]


@pytest.fixture
def prepare(tmp_path):
    datasets = {}
    for name, task, verb in (("classes", TaskType.CLASSIFICATION, "Classify"), ("cwe", TaskType.RETRIEVAL, "Find")):
        splits = SPLITS if task.labelled else [None] * 3
        texts = [("", f"{name} first text"), ("Title", "second text"), ("", f"{name} third text")]
        documents = [Document(str(i), *texts[i], split=splits[i]) for i in range(3)]
        examples = {
            split: [TrainingExample(f"{split}{i}", name, task, f"{split} query of {name}") for i in range(3)]
            for split in SPLITS
        }
        datasets[name] = PreparedSet(task, documents, examples, f"Instruct: {verb}\nQuery: ")
    return publish_prepared(tmp_path / "prepare", datasets)


def test_vocabulary_texts_leave_held_out_items_and_queries_out(prepare):
    found = list(tokenizer_texts(prepare))
    assert found[0] == "classes first text" and "Title second text" in found
    assert "classes third text" not in found and "cwe third text" in found
    assert found.count("train query of cwe") == 3
    assert not [text for text in found if text.startswith(("dev", "test"))]


def test_prompts_are_the_data_sets_and_query_is_retrieval(prepare):
    assert dataset_prompts(prepare) == {
        "query": "Instruct: Find\nQuery: ",
        "classes": "Instruct: Classify\nQuery: ",
        "cwe": "Instruct: Find\nQuery: ",
    }


def test_a_resumed_run_stores_the_same_query_prompt(tmp_path):
    """The recipe's order holds, not the alphabet's, whether the manifest was just written or read again."""
    examples = {"train": [TrainingExample("e", "zebra", TaskType.RETRIEVAL, "query")]}
    sets = {
        name: PreparedSet(TaskType.RETRIEVAL, [Document("d", "", "text")], examples, f"Instruct: {name}\nQuery: ")
        for name in ("zebra", "ant")
    }
    fresh = publish_prepared(tmp_path / "prepare", sets)
    again = load_artifact(fresh.uri)
    assert fresh == again
    assert dataset_prompts(fresh)["query"] == dataset_prompts(again)["query"] == "Instruct: zebra\nQuery: "


def test_initialise_is_deterministic_and_seeded(prepare, tmp_path):
    vectors = {}
    for name, config in {"a": CONFIG, "b": CONFIG, "c": CONFIG.model_copy(update={"seed": 4})}.items():
        artifact = INITIALISE.run(config, {"prepare": prepare}, str(tmp_path / name))
        embedder = load_embedder(artifact.path("model"))
        vectors[name] = embedder.encode(TEXTS)
        assert artifact.manifest["metrics"]["layers"] == 3 and artifact.manifest["metrics"]["dim"] == 64
        assert artifact.manifest["metrics"]["parameters"] == sum(item.numel() for item in embedder.parameters())
    np.testing.assert_array_equal(vectors["a"], vectors["b"])
    assert not np.allclose(vectors["a"], vectors["c"])
    assert describe_folder(tmp_path / "a" / "model")["prompts"]["cwe"] == "Instruct: Find\nQuery: "
    again = load_artifact(str(tmp_path / "a"))  # checksums hold; nothing but the model folder was published
    assert {name.split("/")[0] for name in again.manifest["files"]} == {"model"}


def test_student_is_the_teachers_first_layers_mean_pooled(prepare, tmp_path):
    teacher = INITIALISE.run(CONFIG, {"prepare": prepare}, str(tmp_path / "teacher"))
    student = STUDENT_INIT.run(TruncateConfig(num_layers=2), {"model": teacher}, str(tmp_path / "student"))
    made, whole = load_embedder(student.path("model")), load_embedder(teacher.path("model"))
    assert made.config.pooling == MeanConfig() and made.config.bidirectional
    assert made.config.text == whole.config.text.model_copy(update={"mask_instruction": False})
    assert len(made.embedding_model.layers) == 2 and student.manifest["metrics"]["layers"] == 2
    state, teachers = made.state_dict(), whole.state_dict()
    assert set(state) == {name for name in teachers if "latent" not in name and "layers.2." not in name}
    assert all((state[name] == teachers[name]).all() for name in state)
    assert made.tokeniser.encode(TEXTS, [""] * 3) == whole.tokeniser.encode(TEXTS, [""] * 3)
    assert describe_folder(student.path("model"))["prompts"] == dataset_prompts(prepare)
    assert not list((tmp_path / "student" / "model").glob("*.py"))


@pytest.mark.parametrize("count", [3, 4])
def test_student_must_be_smaller(count, prepare, tmp_path):
    teacher = INITIALISE.run(CONFIG, {"prepare": prepare}, str(tmp_path / "teacher"))
    with pytest.raises(UserError, match=f"num_layers is {count}; it must be less than the teacher's 3 layers"):
        STUDENT_INIT.run(TruncateConfig(num_layers=count), {"model": teacher}, str(tmp_path / "student"))
