"""A small hand-made `prepare` artifact (all three kinds of data sets) and a random model on it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nvembed.core.parquet import write_table, write_tables
from nvembed.core.steps import Step, StepResult
from nvembed.data.config import CweSource, HpoClassesSource, HpoSimilaritySource, PrepareConfig
from nvembed.data.documents import Documents
from nvembed.data.tables import CORPUS_SCHEMA, SPLITS, Document, examples_table
from nvembed.modeling.config import EmbedderConfig, InitialiseConfig, LatentAttentionConfig, RandomBackbone
from nvembed.text.config import TextConfig
from nvembed.training.initialise import INITIALISE
from nvembed.types import Artifact, Config, ScoredId, TaskType, TrainingExample

PREFIX = "Instruct: find {}\nQuery: "
TASKS = {"links": TaskType.RETRIEVAL, "kinds": TaskType.CLASSIFICATION, "pairs": TaskType.STS}
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


def _build(config: Config, inputs: Mapping[str, Artifact], work: str) -> StepResult:
    info: dict[str, dict[str, Any]] = {}
    for name, make in (("links", links), ("kinds", kinds), ("pairs", pairs)):
        documents, examples = make()
        write_tables(Documents.of(documents).tables, CORPUS_SCHEMA, f"{work}/{name}/corpus.parquet")
        for split in SPLITS:
            write_table(examples_table(examples[split]), f"{work}/{name}/examples-{split}.parquet")
        info[name] = {
            "task": TASKS[name].value,
            "instruction": PREFIX.format(name),
            "evaluation_hash": f"hash of {name}",
        }
    return StepResult(metrics={"datasets": info})


@pytest.fixture(scope="session")
def prepare(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    sources = (
        CweSource(name="links", instruction="cwe"),
        HpoClassesSource(name="kinds", instruction="hpo_classes"),
        HpoSimilaritySource(name="pairs", instruction="hpo_similarity"),
    )
    uri = str(tmp_path_factory.mktemp("evaluation") / "prepare")
    return Step("prepare", 1, _build).run(PrepareConfig(sources=sources), {}, uri)


@pytest.fixture(scope="session")
def model(prepare: Artifact) -> Artifact:
    """A random 2-layer model, 32 wide."""
    config = InitialiseConfig(
        backbone=RandomBackbone(vocab_size=400, hidden_size=32, intermediate_size=64, num_layers=2),
        embedder=EmbedderConfig(
            pooling=LatentAttentionConfig(num_latents=8, num_heads=4), text=TextConfig(max_length=48)
        ),
        seed=3,
    )
    return INITIALISE.run(config, {"prepare": prepare}, str(Path(prepare.uri).parent / "initialise"))
