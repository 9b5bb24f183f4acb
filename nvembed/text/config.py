"""Configuration of tokenising and batching."""

from pydantic import Field

from nvembed.types import Config


class TextConfig(Config):
    """From a text to model input.

    `add_bos`/`add_eos`: ids added once around the truncated text (NV-Embed adds both; GPT-2-style BPE has no BOS).
    `mask_instruction`: instruction (and BOS before it) left out of pooling; they still act through attention.
    """

    max_length: int = Field(
        512, ge=8, description="Most tokens of a model input, prompt and BOS/EOS included; a longer text is truncated."
    )
    add_bos: bool = Field(False, description="Put the tokenizer's BOS token before every input.")
    add_eos: bool = Field(
        True, description="Put the tokenizer's EOS token after every input; add_bos, add_eos or both must be true."
    )
    mask_instruction: bool = Field(
        True,
        description="Leave the prompt's tokens out of pooling, as NV-Embed does; they still act through attention.",
    )
