"""Cross-encoder rerankers: query and document in one input, one score for the pair.

One forward for each pair; more accurate than comparing vectors, and used where few pairs remain (mining's filters).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nvembed.core.model_cache import local_model
from nvembed.retrieval.config import CrossEncoderModel
from nvembed.types import UserError


class CrossScorer:
    """A sentence-transformers `CrossEncoder` with one output, run in float32.

    Raises:
        UserError: it cannot be loaded, or gives more than one number.
    """

    def __init__(self, model: CrossEncoderModel, device: str = "cpu") -> None:
        from sentence_transformers import CrossEncoder

        from nvembed.core.runtime import no_progress_bars

        folder = str(local_model(model.name, model.revision))
        try:
            with no_progress_bars():
                self._model = CrossEncoder(
                    folder,
                    device=device,
                    max_length=model.max_length,
                    trust_remote_code=False,
                    local_files_only=True,
                    model_kwargs={"use_safetensors": True},
                )
        except (OSError, ValueError) as error:
            raise UserError(f"cross-encoder {model.name!r} cannot be loaded: {error}") from error
        if self._model.num_labels != 1:
            raise UserError(
                f"cross-encoder {model.name!r} gives {self._model.num_labels} numbers for a pair; a reranker gives one"
            )
        self._batch = model.batch_pairs

    def scores(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """float64 [N], 0 to 1 (sigmoid of the model's number), of one query's documents.

        Only the query's own documents share a batch, so a score does not depend on what else is scored.
        """
        import torch

        if not documents:
            return np.empty(0)
        pairs = [(query, document) for document in documents]
        scores = self._model.predict(
            pairs, batch_size=self._batch, show_progress_bar=False, activation_fn=torch.nn.Sigmoid()
        )
        return np.asarray(scores, dtype=np.float64).reshape(-1)
