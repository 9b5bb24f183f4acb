"""A small hand-made `prepare` artifact with traps for leakage, a random teacher on it, and its 1-layer student."""

from pathlib import Path

import pytest
from artifacts import PreparedSet, publish_prepared, tiny_model

from nvembed.data.tables import SPLITS, Document
from nvembed.modeling.config import TruncateConfig
from nvembed.training.initialise import STUDENT_INIT
from nvembed.types import Artifact, ScoredId, TaskType, TrainingExample


def links() -> tuple[list[Document], dict[str, list[TrainingExample]]]:
    """Documents 0-9 answer train queries, 10-13 test queries only, 14 both, 15-19 none; 20 copies a held-out name."""
    documents = [Document(f"d{i:02d}", f"Title {i}" if i % 2 else "", f"the document number {i}") for i in range(20)]
    documents.append(Document("d20", "", "held out  KIND text 3 of test"))
    examples: dict[str, list[TrainingExample]] = {split: [] for split in SPLITS}

    def add(split: str, key: str, query: str, positive: int) -> None:
        positives = (ScoredId(f"d{positive:02d}"),)
        examples[split].append(TrainingExample(key, "links", TaskType.RETRIEVAL, query, positives))

    for i in range(10):
        add("train", f"q{i}", f"a question about {i}", i)
    add("train", "shared", "a question about fourteen", 14)
    add("train", "twin", "Held out KIND text 3 of test", 0)  # a text of another set's held-out class
    for i in range(10, 13):
        add("test", f"t{i}", f"an unseen question about {i}", i)
    add("test", "t14", "an unseen question about fourteen", 14)
    add("dev", "t13", "an unseen question about 13", 13)
    return documents, examples


def kinds() -> tuple[list[Document], dict[str, list[TrainingExample]]]:
    documents: list[Document] = []
    examples: dict[str, list[TrainingExample]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for i in range(6):
            text = f"{'seen' if split == 'train' else 'held out'} kind text {i} of {split}"
            label = f"{split} {i % 2}"
            documents.append(Document(f"{split}{i}", "", text, label, split))
            examples[split].append(TrainingExample(f"{split}{i}", "kinds", TaskType.CLASSIFICATION, text, label=label))
    return documents, examples


def pairs() -> tuple[list[Document], dict[str, list[TrainingExample]]]:
    documents: list[Document] = []
    examples: dict[str, list[TrainingExample]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        texts = [f"{split} pair text {i}" for i in range(6)]
        documents += [Document(f"{split}{i}", "", text, split=split) for i, text in enumerate(texts)]
        for i in range(5):
            positives = (ScoredId(f"{split}{i + 1}", i / 5),)
            examples[split].append(TrainingExample(f"{split}{i}", "pairs", TaskType.STS, texts[i], positives))
    return documents, examples


@pytest.fixture(scope="session")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    datasets = {
        name: PreparedSet(task, *make(), f"Instruct: find {name}\nQuery: ")
        for name, task, make in (
            ("links", TaskType.RETRIEVAL, links),
            ("kinds", TaskType.CLASSIFICATION, kinds),
            ("pairs", TaskType.STS, pairs),
        )
    }
    return publish_prepared(tmp_path_factory.mktemp("distill") / "prepare", datasets)


@pytest.fixture(scope="session")
def teacher(prepare: Artifact) -> Artifact:
    """A random 2-layer model, 32 wide, with latent attention."""
    return tiny_model(Path(prepare.uri).parent / "initialise", prepare)


@pytest.fixture(scope="session")
def before(teacher: Artifact) -> Artifact:
    """The teacher's first layer, not trained yet."""
    config = TruncateConfig(num_layers=1)
    return STUDENT_INIT.run(config, {"model": teacher}, str(Path(teacher.uri).parent / "student_init"))
