"""The one builder of artifacts made by hand: prepared data, published steps, tiny models.

    prepared = publish_prepared(tmp_path / "prepare", {"links": PreparedSet(TaskType.RETRIEVAL, documents, examples)})
    scores = publish(tmp_path / "evaluate", "evaluate", write_scores, model=model)

A real `Step` publishes everything, and prepared data goes through the writers of `nvembed.data`, so a test reads the
formats of a run. `tests/` is on pytest's `pythonpath`: any test may `import artifacts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvembed.core import storage
from nvembed.core.parquet import write_table, write_tables
from nvembed.core.steps import Step, StepResult
from nvembed.data.config import FilesSource, PrepareConfig
from nvembed.data.documents import Documents
from nvembed.data.tables import CORPUS_SCHEMA, SPLITS, Document, examples_table
from nvembed.types import Artifact, Config, TaskType, TrainingExample

if TYPE_CHECKING:
    from nvembed.modeling.config import EmbedderConfig

PROMPT = "Instruct: find it\nQuery: "


class NoOptions(Config):
    """Config of a published step that has no options."""


def publish(
    uri: str | Path,
    kind: str,
    build: Callable[[str], StepResult | Mapping[str, Any] | None] | None = None,
    config: Config | None = None,
    **inputs: Artifact,
) -> Artifact:
    """Publish one step.

    Args:
        kind: name of the step in its manifest.
        build: writes the files under the URI it is given; returns a `StepResult`, the step's metrics, or nothing.
        inputs: artifacts by their role in the step.
    """

    def run(config: Config, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
        result = build(work_uri) if build else None
        return result if isinstance(result, StepResult) else StepResult(metrics=dict(result or {}))

    return Step(kind, 1, run).run(config or NoOptions(), inputs, str(uri))


@dataclass(frozen=True)
class PreparedSet:
    """A data set of a `prepare` artifact.

    Attributes:
        examples: by split; a plain sequence is the training split.
        prompt: the rendered instruction, "" for none.
        info: more of what `prepare` records about a data set, such as its `evaluation_hash`.
    """

    task: TaskType
    documents: Sequence[Document]
    examples: Mapping[str, Sequence[TrainingExample]] | Sequence[TrainingExample]
    prompt: str = PROMPT
    info: Mapping[str, Any] = field(default_factory=dict)

    def write(self, uri: str) -> dict[str, Any]:
        """Write corpus and examples of every split into a folder; the data set's entry in the step's metrics."""
        by_split = self.examples if isinstance(self.examples, Mapping) else {"train": self.examples}
        assert set(by_split) <= set(SPLITS), sorted(by_split)
        write_tables(Documents.of(self.documents).tables, CORPUS_SCHEMA, storage.join(uri, "corpus.parquet"))
        for split in SPLITS:
            write_table(examples_table(by_split.get(split, ())), storage.join(uri, f"examples-{split}.parquet"))
        return {"task": self.task.value, "instruction": self.prompt, **self.info}


def publish_prepared(uri: str | Path, datasets: Mapping[str, PreparedSet]) -> Artifact:
    """A published `prepare` artifact of these data sets, in this order."""
    sources = tuple(
        FilesSource(name=name, task=dataset.task.value, instruction="web_search", uris=(f"{name}.jsonl",))
        for name, dataset in datasets.items()
    )

    def build(work_uri: str) -> dict[str, Any]:
        return {"datasets": {name: item.write(storage.join(work_uri, name)) for name, item in datasets.items()}}

    return publish(uri, "prepare", build, PrepareConfig(sources=sources))


def tiny_model(uri: str | Path, prepared: Artifact) -> Artifact:
    """A published `initialise` step: two random layers, 32 wide, latent attention, the data's vocabulary."""
    from nvembed.modeling.config import EmbedderConfig, InitialiseConfig, LatentAttentionConfig, RandomBackbone
    from nvembed.text.config import TextConfig
    from nvembed.training.initialise import INITIALISE

    pooling = LatentAttentionConfig(num_latents=8, num_heads=4)
    config = InitialiseConfig(
        backbone=RandomBackbone(vocab_size=400, hidden_size=32, intermediate_size=64, num_layers=2),
        embedder=EmbedderConfig(pooling=pooling, text=TextConfig(max_length=48)),
        seed=3,
    )
    return INITIALISE.run(config, {"prepare": prepared}, str(uri))


def tiny_folder(
    folder: Path, texts: Sequence[str], config: EmbedderConfig | None = None, prompts: Mapping[str, str] | None = None
) -> Path:
    """A model folder without a step around it: two random layers, 32 wide, a vocabulary learned from `texts`."""
    from nvembed.modeling.assemble import build_embedder
    from nvembed.modeling.backbones import load_backbone
    from nvembed.modeling.config import EmbedderConfig, LatentAttentionConfig, RandomBackbone
    from nvembed.modeling.folder import save_embedder

    backbone = RandomBackbone(hidden_size=32, intermediate_size=64, vocab_size=300)
    config = config or EmbedderConfig(pooling=LatentAttentionConfig(num_latents=4, num_heads=2))
    embedder = build_embedder(*load_backbone(backbone, [*texts] * 20, 0), config, 0)
    save_embedder(embedder, folder, prompts=dict(prompts or {}))
    return folder
