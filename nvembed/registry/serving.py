"""The pyfunc model of a registered version, for `mlflow.pyfunc` and `mlflow models serve`: `llm/v1/embeddings`.

This file is copied into the version (MLflow's models from code). It does not import nvembed, so it runs without it.
The model folder is loaded by sentence-transformers. Where its pooling needs the folder's own modules, they are trusted
if and only if they are the files that were registered: their SHA-256 are in the version's MLmodel. Loading a pyfunc
runs the version's code in any case; this adds nothing to whom one trusts.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel

FIELDS = ("input", "prompt_name", "instruction", "dimensions")
BATCH_SIZE = 32


def refused(message: str) -> MlflowException:
    """A mistake of the caller: HTTP status 400."""
    return MlflowException.invalid_parameter_value(message)


class Embeddings:
    """Texts to unit vectors, with the folder's prompts.

    Request: `input` (a text or a list of texts) and at most one of `prompt_name` (of the folder) and `instruction` (a
    task in words, or a key of nvembed's catalogue); `dimensions` cuts the vectors to a Matryoshka prefix, of length 1
    again. Response: the shape of OpenAI's embeddings.
    """

    def load_context(self, context: Any) -> None:
        """Load the folder; refuse code that was not registered, and libraries that compute other vectors."""
        from sentence_transformers import SentenceTransformer

        self.settings: dict[str, Any] = dict(context.model_config or {})
        folder = Path(context.artifacts["model"])
        code: dict[str, str] = self.settings["code"]
        for name, expected in code.items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
                raise refused(f"{folder / name} is not the code that was registered, so it is not run")
        unknown = {path.name for path in folder.rglob("*.py")} - set(code)
        if unknown:
            raise refused(f"{folder} holds code that was not registered: {', '.join(sorted(unknown))}")
        self.model = SentenceTransformer(str(folder), trust_remote_code=bool(code), local_files_only=True)
        self.prompts = {name: prompt or "" for name, prompt in self.model.prompts.items()}
        self._check_probes(folder)

    def _check_probes(self, folder: Path) -> None:
        from safetensors.numpy import load_file

        rows = json.loads((folder / "probes.json").read_text(encoding="utf-8"))
        expected_PD = load_file(folder / "probes.safetensors")["vectors"]
        probe_PD = np.stack([self._encode([row["text"]], row["instruction"])[0] for row in rows])
        distance = float(np.linalg.norm(probe_PD - expected_PD, axis=1).max())
        if not distance <= float(self.settings["tolerance"]):
            raise refused(
                f"{folder}: its probe texts give other vectors than stored (distance {distance:.3g}): the installed "
                "libraries compute this model differently; install those of requirements.txt"
            )

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow reads hints as schemas
        """Embed a request; see the class."""
        texts, options = read_request(model_input, params or {})
        prefix = self._prefix(options)
        width = int(self.settings["dim"])
        dimensions = int(options.get("dimensions") or width)
        if not 1 <= dimensions <= width:
            raise refused(f"dimensions {dimensions}: this model's vectors have {width} numbers; choose 1 to {width}")
        vectors_ND = self._encode(texts, prefix)[:, :dimensions]
        if dimensions < width:
            vectors_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True).clip(1e-12)
        tokens = self._count([prefix + text for text in texts])
        rows = [
            {"object": "embedding", "index": index, "embedding": [float(value) for value in row_D]}
            for index, row_D in enumerate(vectors_ND)
        ]
        return {
            "object": "list",
            "data": rows,
            "model": str(self.settings["name"]),
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _prefix(self, options: dict[str, Any]) -> str:
        name, instruction = options.get("prompt_name"), options.get("instruction")
        if name and instruction:
            raise refused("give prompt_name or instruction, not both")
        if name:
            if name not in self.prompts:
                raise refused(f"no prompt {name!r}; this model has {', '.join(self.prompts)}")
            return self.prompts[name]
        return self._rendered(str(instruction)) if instruction else ""

    def _rendered(self, instruction: str) -> str:
        """The prompt of a task sentence or its key, by the rules of `nvembed.text.instructions.task_sentence`."""
        template, catalogue = str(self.settings["template"]), self.settings["instructions"]
        if instruction in catalogue:
            return template.replace("{task}", catalogue[instruction])
        if instruction.lower().startswith(template.split("{", 1)[0].strip().lower()):
            raise refused(f"instruction {instruction[:60]!r} is a rendered prompt; give the task alone")
        if not any(character.isspace() for character in instruction):
            nearest = difflib.get_close_matches(instruction, list(catalogue), n=1, cutoff=0.0)[0]
            raise refused(
                f"unknown instruction {instruction!r}: no key of the catalogue ({', '.join(catalogue)}) and no "
                f"sentence. Did you mean {nearest!r}?"
            )
        return template.replace("{task}", instruction)

    def _encode(self, texts: list[str], prefix: str) -> np.ndarray:
        vectors_ND = self.model.encode(
            texts, prompt=prefix, batch_size=BATCH_SIZE, show_progress_bar=False, convert_to_numpy=True
        )
        return np.asarray(vectors_ND, dtype=np.float32)

    def _count(self, texts: list[str]) -> int:
        limit = int(self.model.max_seq_length or 2**31)
        return sum(min(len(ids), limit) for ids in self.model.tokenizer(texts, verbose=False)["input_ids"])


def read_request(model_input: Any, params: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Texts and options of a request, as MLflow hands it over: a table whose columns are the fields, or a mapping."""
    if hasattr(model_input, "columns"):
        columns = {str(name): model_input[name].tolist() for name in model_input.columns}
    elif isinstance(model_input, dict):
        columns = {name: value if isinstance(value, list) else [value] for name, value in model_input.items()}
    else:
        columns = {"input": [model_input] if isinstance(model_input, str) else list(model_input)}
    unknown = [name for name in columns if name not in FIELDS]
    if unknown or "input" not in columns:
        raise refused(f"a request has the fields {', '.join(FIELDS)}; this one has {', '.join(columns)}")
    texts = [
        text for cell in columns.pop("input") for text in (cell if isinstance(cell, list | np.ndarray) else [cell])
    ]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise refused("input: give a text or a list of texts")
    options = {name: value for name, value in params.items() if value not in (None, "", 0)}
    for name, values in columns.items():
        given = {value for value in values if value is not None and value == value}  # NaN: no value
        if len(given) > 1 or (given and name in options and options[name] not in given):
            raise refused(f"{name}: one value for the whole request")
        if given:
            options[name] = given.pop()
    return texts, options


class EmbeddingsModel(Embeddings, PythonModel):
    """The class for MLflow, which requires type hints of a class with its own `predict`; the schema is in MLmodel."""


mlflow.models.set_model(EmbeddingsModel())
