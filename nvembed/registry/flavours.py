"""The MLflow model around a model folder: `MLmodel`, signature, example, serving code, pinned requirements.

One version holds both flavours over one copy of the folder: `python_function` (our `serving.py`, models from code) and,
where the folder needs no code of its own, `sentence_transformers`.
"""

from __future__ import annotations

import hashlib
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nvembed.text.instructions import CATALOGUE, instruction_prefix

FOLDER = "model.sentence_transformer"  # the name that MLflow's sentence-transformers flavour looks for
SERVING = "serving.py"
TASK = "llm/v1/embeddings"
REQUIREMENTS = ("mlflow", "sentence-transformers", "transformers", "tokenizers", "torch", "safetensors", "numpy")
_A_SENTENCE = "a sentence"


def write_flavours(target: Path, folder: Path, name: str) -> None:
    """Write the MLflow model without the model folder, which is stored at `FOLDER` beside it.

    Args:
        target: directory to make.
        folder: the model folder; read only.
        name: what responses call the model.
    """
    import mlflow.pyfunc
    from mlflow.models import Model

    from nvembed.modeling.config import EmbedderConfig
    from nvembed.modeling.folder import describe_folder
    from nvembed.modeling.probes import TOLERANCE
    from nvembed.modeling.sentence_folder import CODE, needs_code

    description = describe_folder(folder)
    config = EmbedderConfig.model_validate(description["embedder"])
    code = CODE if needs_code(config) else {}
    settings = {
        "name": name,
        "dim": int(description["dim"]),
        "tolerance": TOLERANCE,
        "code": {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in sorted(code)},
        "template": instruction_prefix(_A_SENTENCE).replace(_A_SENTENCE, "{task}"),
        "instructions": CATALOGUE,
    }
    quiet = [logging.getLogger(name) for name in ("mlflow.pyfunc", "mlflow.utils.environment", "mlflow.models.model")]
    levels = [logger.level for logger in quiet]
    try:
        for logger in quiet:
            logger.setLevel(logging.ERROR)
        mlflow.pyfunc.save_model(
            target,
            python_model=str(Path(__file__).parent / SERVING),
            model_config=settings,
            signature=_signature(),
            input_example={"input": ["a text", "another text"]},
            pip_requirements=[f"{package}=={_public(version(package))}" for package in REQUIREMENTS],
            metadata={"task": TASK, "nvembed": {"needs_code": bool(code)}},
        )
    finally:
        for logger, level in zip(quiet, levels, strict=True):
            logger.setLevel(level)
    made = Model.load(str(target))
    made.flavors[mlflow.pyfunc.FLAVOR_NAME] |= {
        "artifacts": {"model": {"path": FOLDER, "uri": FOLDER}},
        "model_code_path": SERVING,  # MLflow noted the file's path on this machine
    }
    made.flavors[mlflow.pyfunc.FLAVOR_NAME].pop("cloudpickle_version", None)  # nothing here is pickled
    if not code:
        made.add_flavor(
            "sentence_transformers", sentence_transformers_version=version("sentence-transformers"), code=None
        )
    made.model_size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    made.save(str(target / "MLmodel"))


def _public(installed: str) -> str:
    """A version as an index knows it: `2.13.0` of `2.13.0+cpu`."""
    return installed.split("+")[0]


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.llm import EMBEDDING_MODEL_OUTPUT_SCHEMA

    # In an HTTP request the options are split off as parameters; in Python they may also be columns beside the input.
    inputs: Any = [
        ColSpec(DataType.string, "input"),
        ColSpec(DataType.string, "prompt_name", required=False),
        ColSpec(DataType.string, "instruction", required=False),
        ColSpec(DataType.long, "dimensions", required=False),
    ]
    parameters = [
        ParamSpec("prompt_name", DataType.string, ""),
        ParamSpec("instruction", DataType.string, ""),
        ParamSpec("dimensions", DataType.long, 0),
    ]
    return ModelSignature(Schema(inputs), EMBEDDING_MODEL_OUTPUT_SCHEMA, ParamSchema(parameters))
