"""The encoder of stock sentence-transformers models, packed where their transformer can be.

Shapes: N texts, C texts of a chunk, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from nvembed.types import UserError

if TYPE_CHECKING:
    import torch

_WINDOW_TEXTS = 4096  # tokenised at a time, so that memory does not grow with the number of texts
_TOKENISED_TOGETHER = 1024
_DEFAULT_LENGTH = 512  # of a model that does not say how long its texts may be


class SentenceEncoder:
    """A sentence-transformers model: packed where its transformer can be, else in windows of similar token length.

    Its own `encode` sorts by characters and pads. Tokenising, pooling and what follows it are its own modules.
    """

    def __init__(self, folder: str, instruction: bool, precision: str, token_budget: int, device: str) -> None:
        from sentence_transformers import SentenceTransformer

        from nvembed.core.runtime import no_progress_bars

        try:
            with no_progress_bars():
                self._model = SentenceTransformer(
                    folder,
                    device=device,
                    trust_remote_code=False,
                    local_files_only=True,
                    model_kwargs={"use_safetensors": True},
                ).eval()
        except (OSError, ValueError) as error:
            raise UserError(f"model {folder!r} cannot be loaded: {error}") from error
        self._instruction, self.precision = instruction, precision
        self._token_budget, self._device = token_budget, device
        dim = self._model.get_embedding_dimension()
        if dim is None:
            raise UserError(
                f"model {folder!r} does not state its embedding dimension; it cannot be used as an encoder."
            )
        self.dim = int(dim)
        self.max_length = int(self._model.max_seq_length or _DEFAULT_LENGTH)
        self.prompts: Mapping[str, str] = {name: prompt or "" for name, prompt in self._model.prompts.items()}

    def used_prompt(self, prompt: str) -> str:
        """See `Encoder.used_prompt`."""
        return prompt if self._instruction else ""

    def encode(
        self,
        texts: Sequence[str],
        prompts: Sequence[str],
        max_length: int | None = None,
        *,
        cut_N: np.ndarray | None = None,
    ) -> np.ndarray:
        """See `Encoder.encode`."""
        import torch

        cut_N = np.empty(len(texts), dtype=np.int8) if cut_N is None else cut_N
        joined = [self.used_prompt(prompt) + text for prompt, text in zip(prompts, texts, strict=True)]
        matrix_ND = np.empty((len(texts), self.dim), dtype=np.float32)
        with torch.inference_mode(), self._cut_to(max_length):
            for start in range(0, len(joined), _WINDOW_TEXTS):
                window = slice(start, start + _WINDOW_TEXTS)
                self._encode_window(joined[window], matrix_ND[window], cut_N[window])
        return matrix_ND

    def _encode_window(self, texts: list[str], out_ND: np.ndarray, cut_N: np.ndarray) -> None:
        from nvembed.modeling.packed import packing, packs
        from nvembed.text.batching import packed_chunks, token_budget_chunks

        backbone = self._packable()
        if backbone is None:
            for chunk in token_budget_chunks(self._lengths(texts, cut_N), self._token_budget):
                out_ND[chunk] = self._unit(self._padded([texts[index] for index in chunk]))
            return
        ids = self._token_ids(texts, cut_N)
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        if not packs(backbone, int(lengths.max())):
            for chunk in token_budget_chunks(lengths, self._token_budget):
                out_ND[chunk] = self._unit(self._padded([texts[index] for index in chunk]))
            return
        with packing(backbone):
            for chunk in packed_chunks(lengths, self._token_budget):
                out_ND[chunk] = self._unit(self._packed(backbone, [ids[index] for index in chunk]))

    def _packable(self) -> Any:
        """The transformer, if it is a stock one followed by stock pooling and without a chat template; else None."""
        from sentence_transformers.base.modules.transformer import Transformer
        from sentence_transformers.sentence_transformer.modules.pooling import Pooling

        modules: list[Any] = list(self._model)
        if len(modules) < 2 or type(modules[0]) is not Transformer or type(modules[1]) is not Pooling:
            return None
        text_config = modules[0].modality_config.get("text", {})
        plain = text_config.get("method") == "forward" and text_config.get("method_output_name") == "last_hidden_state"
        return modules[0].model if plain and "message" not in modules[0].modality_config else None

    def _token_ids(self, texts: list[str], cut_N: np.ndarray) -> list[list[int]]:
        """Token ids of the model's own preprocessing, without its padding."""
        bare = {"text": {"padding": False}, "common": {"return_tensors": None}}
        ids: list[list[int]] = []
        for start in range(0, len(texts), _TOKENISED_TOGETHER):
            part = slice(start, start + _TOKENISED_TOGETHER)
            features = self._model.preprocess(texts[part], processing_kwargs=bare)
            _mark_cut(features, cut_N[part])
            ids += features["input_ids"]
        return ids

    def _packed(self, backbone: Any, texts: list[list[int]]) -> torch.Tensor:
        """Vectors [C, D] of a packed chunk: the model's own pooling and later modules over padded states."""
        from nvembed.modeling.packed import packed_states

        with self._autocast():
            states_TD, layout = packed_states(backbone, texts)
            states_CLD, mask_CL = layout.padded(states_TD.float())
            features = {"token_embeddings": states_CLD, "attention_mask": mask_CL.long()}
            for module in list(self._model)[1:]:
                features = module(features)
        return features["sentence_embedding"]

    def _padded(self, texts: list[str]) -> torch.Tensor:
        """Vectors [C, D] of a padded chunk, by the model's own forward."""
        import torch

        features = {
            name: value.to(self._device) if isinstance(value, torch.Tensor) else value
            for name, value in self._model.preprocess(texts).items()
        }
        with self._autocast():
            vector_CD: torch.Tensor = self._model.forward(features)["sentence_embedding"]
        return vector_CD

    def _unit(self, vector_CD: torch.Tensor) -> np.ndarray:
        # Normalised here in fp32: under bf16 the model's own layer leaves norms 0.2% off.
        import torch

        unit_CD: np.ndarray = torch.nn.functional.normalize(vector_CD.float(), dim=1).cpu().numpy()
        return unit_CD

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        from nvembed.modeling.precision import autocast

        return autocast(self.precision, torch.device(self._device))

    @contextmanager
    def _cut_to(self, max_length: int | None) -> Iterator[None]:
        """Inside, texts are cut to `max_length` tokens."""
        if max_length is None:
            yield
            return
        before = self._model.max_seq_length
        specials = getattr(self._model.tokenizer, "num_special_tokens_to_add", lambda: 0)()
        if max_length <= specials:
            raise UserError(f"max_length is {max_length}; special tokens take {specials}. Give {specials + 1} or more.")
        positions = getattr(getattr(self._model[0], "config", None), "max_position_embeddings", None)
        if positions is not None and max_length > positions:
            raise UserError(f"max_length is {max_length}, but the model has {positions} positions. Give at most those.")
        self._model.max_seq_length = max_length
        try:
            yield
        finally:
            self._model.max_seq_length = before

    def _lengths(self, texts: list[str], cut_N: np.ndarray) -> np.ndarray:
        from transformers import PreTrainedTokenizerBase

        tokenizer = self._model.tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerBase):  # static models: length only decides the order of work
            return np.array([max(len(text) // 4, 1) for text in texts], dtype=np.int32)
        limit = self._model.max_seq_length or _DEFAULT_LENGTH
        encoded = tokenizer(texts, truncation=True, max_length=limit, return_attention_mask=False)
        _mark_cut(encoded, cut_N)
        return np.array([len(ids) for ids in encoded["input_ids"]], dtype=np.int32)


def _mark_cut(features: Any, cut_N: np.ndarray) -> None:
    """Mark the texts that a fast tokenizer cut: those with tokens left over, which it has made in any case."""
    encodings = getattr(features, "encodings", None)
    if encodings is not None:
        longest = max(map(len, encodings), default=0)  # a cut text is as long as there is room
        cut_N[:] = [len(encoding) == longest and bool(encoding.overflowing) for encoding in encodings]
