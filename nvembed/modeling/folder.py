"""The model folder: a sentence-transformers folder that is also ours.

    config.json, model.safetensors, tokenizer files    the backbone, as transformers saves it (no language-model head)
    1_Pooling/, 2_Normalize/, modules.json, ...         what sentence-transformers reads (`sentence_folder.py`)
    nvembed.json                                        format version and `EmbedderConfig`; written last
    probes.json, probes.safetensors                     texts and their vectors, checked at load (`probes.py`)
    adapter/                                            the LoRA layers merged into it, if it had any (`adapters.py`)
    recipe.yaml, README.md                              where it comes from

Only `nvembed.json` makes a folder ours. It is built beside its place and renamed, so a killed save leaves nothing
half written. Weights are safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nvembed.core.arguments import check_address, check_flag, public, shown
from nvembed.core.formats import check_format, stamp
from nvembed.core.messages import nearest
from nvembed.core.runtime import no_progress_bars
from nvembed.core.steps import DESCRIPTION, RECIPE
from nvembed.modeling import probes
from nvembed.modeling.adapters import ADAPTER_FOLDER, KeptAdapter, has_adapter
from nvembed.modeling.card import model_card
from nvembed.modeling.config import HEADS, EmbedderConfig, LastTokenConfig, MeanConfig, PoolingConfig
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.origin import CARD
from nvembed.modeling.sentence_folder import POOLING_FOLDER, library_versions, write_json, write_modules, write_prompts
from nvembed.text.config import TextConfig
from nvembed.text.tokenise import Tokeniser
from nvembed.types import UserError

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"


def save_embedder(
    embedder: Embedder,
    folder: Path | str,
    *,
    recipe: Mapping[str, Any] | None = None,
    prompts: Mapping[str, str] | None = None,
    card: str | None = None,
    adapter: KeptAdapter | None = None,
    licences: Sequence[Mapping[str, str]] = (),
) -> None:
    """Write a model folder; one of ours at the same place is replaced.

    Args:
        embedder: merged (`merge_adapter`), weights in float32.
        recipe: resolved recipe, stored as `recipe.yaml`.
        prompts: name -> full instruction prefix, offered by sentence-transformers as `prompt_name`.
        card: notes on data and licences for the model card (Markdown).
        adapter: the LoRA layers merged into the weights, stored beside them in `adapter/`.
        licences: of what the model was made from, for the card: rows of `kind`, `name`, `licence`.

    Raises:
        UserError: the folder holds something that is not a model folder of ours.
        ValueError: LoRA layers are not merged.
    """
    folder, prompts = Path(folder), dict(prompts or {})
    if has_adapter(embedder):
        raise ValueError("the embedder carries LoRA layers: call merge_adapter before saving")
    if folder.exists() and not (folder.is_dir() and (_is_ours(folder) or not any(folder.iterdir()))):
        raise UserError(f"{folder} is not a model folder of nvembed, so it is not overwritten. Choose another place.")
    staging = _aside(folder, "saving")
    _remove(staging)
    staging.mkdir(parents=True)
    parameters = sum(parameter.numel() for parameter in embedder.parameters())
    text = model_card(embedder.config, embedder.dim, parameters, prompts, card, licences=licences)
    (staging / CARD).write_text(text, encoding="utf-8")
    _write(embedder, staging, recipe, prompts)
    if adapter is not None:
        adapter.write(staging / ADAPTER_FOLDER)
        _readable(staging)
    replaced = _aside(folder, "replaced")
    _remove(replaced)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(staging, folder)
    _remove(replaced)
    if not any(staging.parent.iterdir()):
        staging.parent.rmdir()


def _write(embedder: Embedder, folder: Path, recipe: Mapping[str, Any] | None, prompts: dict[str, str]) -> None:
    config = embedder.config
    with no_progress_bars():
        embedder.embedding_model.save_pretrained(folder)
    embedder.tokeniser.tokenizer.save_pretrained(folder)
    write_modules(folder, config, embedder.dim)
    if embedder.latent_attention_model is not None:
        weights = {
            name: tensor.contiguous().cpu() for name, tensor in embedder.latent_attention_model.state_dict().items()
        }
        save_file(weights, folder / POOLING_FOLDER / WEIGHTS, metadata={"format": "pt"})
    write_prompts(folder, prompts)
    if recipe is not None:
        text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        (folder / RECIPE).write_text(text, encoding="utf-8")
    probes.write_probes(embedder, folder)
    _readable(folder)
    description = {
        **stamp(FORMAT_VERSION),
        "embedder": config.model_dump(mode="json"),
        "dim": embedder.dim,
        "parameters": sum(parameter.numel() for parameter in embedder.parameters()),
        "prompts": prompts,
        "versions": library_versions(),
    }
    write_json(folder / DESCRIPTION, description)


def _readable(folder: Path) -> None:
    mode = (folder / CARD).stat().st_mode  # safetensors makes files that only their owner can read
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)


def _aside(folder: Path, what: str) -> Path:
    # `.tmp` is never part of an artifact, so a killed save inside a step leaves nothing that would be published.
    return folder.absolute().parent / ".tmp" / f"nvembed-{what}-{folder.name}"


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _is_ours(folder: Path) -> bool:
    return (folder / DESCRIPTION).is_file()


def describe_folder(folder: Path | str) -> dict[str, Any]:
    """Contents of a folder's `nvembed.json`: `embedder`, `dim`, `parameters`, `prompts`, `versions`.

    Raises:
        UserError: not a model folder of ours, or of a format this nvembed does not read.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} is not an nvembed model folder (no {DESCRIPTION}). {_what_to_do(str(folder))}")
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_format(description, str(path), newest=FORMAT_VERSION)
    except UserError:
        raise
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}). Copy or build the folder again.") from error
    return description


def _what_to_do(given: str) -> str:
    """What to do with something that is not a model folder of ours."""
    folder = Path(given)
    if given.startswith("models:/"):
        name = given.removeprefix("models:/") or "NAME@ALIAS"
        return f"It names a registry version: run `nvembed registry export {name} DIR` and give DIR."
    if "://" in given or given.partition("/")[0].endswith(":"):
        return "A local folder is needed; nvembed.core.model_cache.local_model(uri) fetches a remote one."
    if folder.is_file():
        return "It is a file; give the folder that holds it."
    if not folder.exists():
        parent = folder.parent
        names = [path.name for path in parent.iterdir()] if parent.is_dir() else []
        return f"There is nothing at this path.{nearest(folder.name, names)} Check it."
    if (folder / "modules.json").is_file():
        return "It is a sentence-transformers model: encode_texts(texts, folder) and evaluate_retrieval take it."
    if (folder / "config.json").is_file():
        return (
            "It is a transformers model: train from it (initialise.backbone: {type: pretrained, name: ...}), or turn "
            "an NV-Embed checkpoint into a model folder with `nvembed import`."
        )
    if (folder / "model" / DESCRIPTION).is_file():
        return f"Its subfolder is one: {folder / 'model'}."
    return "Check the path."


@public
def load_embedder(
    folder: Path | str,
    *,
    check_probes: bool = True,
    pooling: PoolingConfig | None = None,
    bidirectional: bool | None = None,
) -> Embedder:
    """Load a model folder on the CPU in float32, evaluation mode.

    Args:
        folder: local model folder: `<step>/model` of a run, or what `nvembed import` or `registry export` wrote.
        check_probes: compute the probe vectors again and refuse the folder when they differ.
        pooling: another pooling than the folder's (mean or last token); probes are then not checked.
        bidirectional: another direction than the folder's; likewise.

    Raises:
        UserError: an argument of another type; not a model folder of ours, damaged, or computed differently by the
            installed libraries.

    Example:
        >>> from nvembed import load_embedder
        >>> model = load_embedder("model", check_probes=False)
        >>> model.encode(["sort a list", "heap overflow"], instruction="web_search").shape == (2, model.dim)
        True
    """
    if isinstance(folder, Embedder):
        raise UserError("folder is an Embedder, which is loaded already; use it as it is.")
    address = check_address("folder", folder, "the path of a model folder")
    check_flag("check_probes", check_probes)
    if bidirectional is not None:
        check_flag("bidirectional", bidirectional)
    if pooling is not None and not isinstance(pooling, (*HEADS, MeanConfig, LastTokenConfig)):
        raise UserError(
            f"pooling is {shown(pooling)}; give MeanConfig() or LastTokenConfig() of nvembed.modeling.config, or None."
        )
    description = describe_folder(address)
    folder = Path(address)
    try:
        stored = EmbedderConfig.model_validate(description["embedder"])
    except ValidationError as error:
        raise UserError(f"{folder / DESCRIPTION} does not fit this nvembed: {error}") from error
    config = stored.model_copy(
        update={
            "pooling": stored.pooling if pooling is None else pooling,
            "bidirectional": stored.bidirectional if bidirectional is None else bidirectional,
        }
    )
    if isinstance(config.pooling, HEADS) and config.pooling != stored.pooling:
        raise UserError(
            f"{folder} has no latent attention like {config.pooling}: only mean and last_token can replace it."
        )
    embedder = Embedder(_load_backbone(folder, stored), load_tokeniser(folder), config).eval()
    embedder.prompts = {"document": "", **description.get("prompts", {})}
    if embedder.latent_attention_model is not None:
        _load_head(embedder, folder)
    if check_probes and config == stored:
        probes.check_probes(embedder, folder)
    return embedder


def _load_backbone(folder: Path, stored: EmbedderConfig) -> Any:
    from transformers import AutoModel

    try:
        with no_progress_bars():
            model = AutoModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: its backbone cannot be loaded ({error}). Copy or build the folder again."
        ) from error
    if (getattr(model.config, "is_causal", True) is False) != stored.bidirectional:
        raise UserError(
            f"{folder}: config.json says is_causal={getattr(model.config, 'is_causal', None)}, {DESCRIPTION} says "
            f"bidirectional={stored.bidirectional}. One of them was changed; copy or build the folder again."
        )
    return model


def load_tokeniser(folder: Path | str) -> Tokeniser:
    """The tokenizer of a model folder, with the text handling its `nvembed.json` states; no weights are read.

    Raises:
        UserError: not a model folder of ours, or a damaged one.
    """
    from transformers import AutoTokenizer

    text = describe_folder(folder)["embedder"]["text"]
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: its tokenizer cannot be loaded ({error}). Copy or build the folder again."
        ) from error
    return Tokeniser(tokenizer, TextConfig.model_validate(text))


def _load_head(embedder: Embedder, folder: Path) -> None:
    assert embedder.latent_attention_model is not None
    try:
        embedder.latent_attention_model.load_state_dict(load_file(folder / POOLING_FOLDER / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: latent attention cannot be loaded ({error}). Copy or build the folder again."
        ) from error
