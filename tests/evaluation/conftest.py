"""A small hand-made `prepare` artifact (all three kinds of data sets) and a random model on it."""

from pathlib import Path

import pytest
from artifacts import PreparedSet, publish_prepared, tiny_model

from nvembed.data.tables import SPLITS, Document
from nvembed.types import Artifact, ScoredId, TaskType, TrainingExample

PREFIX = "Instruct: find {}\nQuery: "
WORDS = ["heap", "stack", "buffer", "script", "query", "token", "session", "secret"]
WORDS += ["path", "race", "lock", "cache", "frame", "packet", "cipher"]


def word(index: int) -> str:
    return WORDS[index % len(WORDS)]


def links() -> tuple[list[Document], dict[str, list[TrainingExample]]]:
    """40 documents; example i asks for document i, every third one for the next too, twice as relevant."""
    documents = [
        Document(f"d{i:02d}", f"{word(i)} {i}" if i % 2 else "", f"about {word(i)} and {word(3 * i + 1)} number {i}")
        for i in range(40)
    ]
    examples: dict[str, list[TrainingExample]] = {split: [] for split in SPLITS}
    for i in range(36):
        positives = (ScoredId(f"d{i:02d}"),) + ((ScoredId(f"d{i + 1:02d}", 2.0),) if i % 3 == 0 else ())
        split = ("train", "dev", "test")[i % 3 if i < 30 else 2]
        query = f"what is {word(i)} with {word(3 * i + 1)}"
        examples[split].append(TrainingExample(f"q{i:02d}", "links", TaskType.RETRIEVAL, query, positives))
    return documents, examples


def kinds() -> tuple[list[Document], dict[str, list[TrainingExample]]]:
    """Three classes a side, each with a word of its own."""
    documents, examples = [], {split: [] for split in SPLITS}
    for side, split in enumerate(SPLITS):
        for i in range(30):
            label = word(5 * side + i % 3)
            text = f"{label} {label} of {word(i + 7)} case {i}"
            documents.append(Document(f"{split}{i:02d}", "", text, label, split))
            examples[split].append(
                TrainingExample(f"{split}{i:02d}", "kinds", TaskType.CLASSIFICATION, text, label=label)
            )
    return documents, examples


def pairs() -> tuple[list[Document], dict[str, list[TrainingExample]]]:
    """Gold is the share of common words."""
    documents, examples = [], {split: [] for split in SPLITS}
    for split in SPLITS:
        for i in range(16):
            common = i % 5
            a = " ".join(word(i + k) for k in range(4))
            b = " ".join(
                [*(word(i + k) for k in reversed(range(common))), *(word(i + 9 - k) for k in range(4 - common))]
            )
            documents += [Document(f"{split}a{i}", "", f"{split} {a}", split=split)]
            documents += [Document(f"{split}b{i}", "", f"{split} {b}", split=split)]
            positives = (ScoredId(f"{split}b{i}", common / 4),)
            examples[split].append(
                TrainingExample(f"{split}a{i}~{split}b{i}", "pairs", TaskType.STS, f"{split} {a}", positives)
            )
    return documents, examples


@pytest.fixture(scope="session")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    datasets = {
        name: PreparedSet(task, *make(), PREFIX.format(name), {"evaluation_hash": f"hash of {name}"})
        for name, task, make in (
            ("links", TaskType.RETRIEVAL, links),
            ("kinds", TaskType.CLASSIFICATION, kinds),
            ("pairs", TaskType.STS, pairs),
        )
    }
    return publish_prepared(tmp_path_factory.mktemp("evaluation") / "prepare", datasets)


@pytest.fixture(scope="session")
def model(prepare: Artifact) -> Artifact:
    """A random 2-layer model, 32 wide."""
    return tiny_model(Path(prepare.uri).parent / "initialise", prepare)
