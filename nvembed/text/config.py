"""Configuration of tokenising and batching."""

from pydantic import Field

from nvembed.types import Config


class TextConfig(Config):
    """From a text to model input.

    `add_bos`/`add_eos`: ids added once around the truncated text (NV-Embed adds both; GPT-2-style BPE has no BOS).
    `mask_instruction`: instruction (and BOS before it) left out of pooling; they still act through attention.
    """

    max_length: int = Field(512, ge=8)
    add_bos: bool = False
    add_eos: bool = True
    mask_instruction: bool = True
