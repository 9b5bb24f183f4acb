"""The `compare_student` step: similarity, size and cost of the student against its teacher.

`comparison.json`: cosine to the teacher on texts outside the student's training, before and after it; parameters, bytes
of weights; CPU seconds to encode the same texts, teacher and student in turns in one process.

Shapes: N texts, S student width, T teacher width.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load as load_safetensors

from nvembed.core import storage
from nvembed.core.model_cache import local_model
from nvembed.core.steps import COMPARISON, OBJECTIVE, Step, StepResult
from nvembed.distill.config import CompareConfig
from nvembed.distill.teacher_embeddings import read_part
from nvembed.evaluation.significance import bootstrap, mean_statistic
from nvembed.modeling.precision import resolve_precision
from nvembed.modeling.shapes import folder_size
from nvembed.retrieval.encoders import Encoder, open_encoder
from nvembed.types import Artifact

logger = logging.getLogger(__name__)

PROJECTION = "projections."


def _build(config: CompareConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    rows, teacher_NT = read_part(inputs["teacher_embeddings"], "holdout", config.holdout_texts)
    texts, prompts = [row["text"] for row in rows], [row["instruction"] for row in rows]
    folders = {name: local_model(inputs[name].path("model")) for name in ("teacher", "before", "student")}
    with _threads(config.threads):
        encoders = {
            name: open_encoder(str(folder), config.threads, config.precision) for name, folder in folders.items()
        }
        cosine: dict[str, Any] = {"texts": len(rows)}
        for name, key in (("before", "before"), ("student", "after")):
            vector_NS = encoders[name].encode(texts, prompts)
            cosine[key] = cosine_to_teacher(vector_NS, teacher_NT, read_projections(inputs[name]), config)
            widths = {width: row for width, row in cosine[key].items() if width != "through"}
            listed = ", ".join(f"{row['value']:.3f} at width {width}" for width, row in widths.items())
            logger.info("cosine to the teacher %s training: %s (%s)", key, listed, cosine[key]["through"])
        del encoders["before"]
        sample = slice(0, config.texts)
        cost = encode_cost(encoders, texts[sample], prompts[sample], config)
    sizes = {name: folder_size(folders[name]) for name in ("teacher", "student")}
    comparison = {
        "cosine_to_teacher": cosine,
        **{
            what: {name: size[what] for name, size in sizes.items()}
            | {"ratio": sizes["student"][what] / sizes["teacher"][what]}
            for what in ("parameters", "bytes")
        },
        "encode_cost": cost,
    }
    storage.write_json(storage.join(work_uri, COMPARISON), comparison)
    return StepResult(rows={"texts": len(rows)}, metrics=comparison)


COMPARE_STUDENT = Step("compare_student", 2, _build)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Limit torch, and with one thread the tokenizers too (they read the variable at each call), for a while."""
    before, variable = torch.get_num_threads(), os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(count)
    if count == 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if variable is None:
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = variable


# -- cosine -----------------------------------------------------------------------------------------------------------


def read_projections(model: Artifact) -> dict[int, np.ndarray]:
    """The up-projections the student was trained with, [T, width] by width; none where nothing was trained."""
    if OBJECTIVE not in model.manifest["files"]:
        return {}
    tensors = load_safetensors(storage.read_bytes(model.path(OBJECTIVE)))
    return {
        int(name.removeprefix(PROJECTION).split(".")[0]): tensor
        for name, tensor in tensors.items()
        if name.startswith(PROJECTION)
    }


def cosine_to_teacher(
    student_NS: np.ndarray, teacher_NT: np.ndarray, projections: Mapping[int, np.ndarray], config: CompareConfig
) -> dict[str, Any]:
    """Mean cosine with its interval: at each trained width through its projection, else of the vectors as they are.

    Returns:
        `{"through": how, "<width>": {value, low, high}}`; without a projection and with unequal widths no width, and
        `through` says why.
    """
    student_S = student_NS.shape[1]
    if projections:
        cosines: dict[str, Any] = {"through": "the projection learned in training"}
        for width, weight_TW in sorted(projections.items(), reverse=True):
            cosines[str(width)] = _mean_cosine(student_NS[:, :width] @ weight_TW.T, teacher_NT, config)
        return cosines
    if student_S == teacher_NT.shape[1]:
        return {
            "through": "no projection: the student's vector as it is, of the teacher's width",
            str(student_S): _mean_cosine(student_NS, teacher_NT, config),
        }
    return {"through": f"not comparable: {student_S} numbers, the teacher has {teacher_NT.shape[1]}, no projection"}


def _mean_cosine(a_ND: np.ndarray, b_ND: np.ndarray, config: CompareConfig) -> dict[str, float]:
    a_ND, b_ND = a_ND.astype(np.float64), b_ND.astype(np.float64)
    norm_N = np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)
    cosine_N = (a_ND * b_ND).sum(axis=1) / np.maximum(norm_N, np.finfo(np.float64).tiny)
    return bootstrap(mean_statistic(cosine_N), len(cosine_N), config.bootstrap_samples, config.seed)


# -- size and cost ----------------------------------------------------------------------------------------------------


def encode_cost(
    encoders: Mapping[str, Encoder], texts: Sequence[str], prompts: Sequence[str], config: CompareConfig
) -> dict[str, Any]:
    """CPU seconds per 1,000 texts, the median of `repeats` rounds in which the models take turns, after a warm-up.

    With one thread its own time is taken, not the process's: Ray's threads work in the same process.
    """
    clock = time.thread_time if config.threads == 1 else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for round_number in range(config.repeats + 1):
        for name, encoder in encoders.items():
            started = clock()
            encoder.encode(texts, prompts)
            if round_number > 0:
                seconds[name].append((clock() - started) * 1000 / len(texts))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "unit": "CPU seconds per 1,000 texts",
        "texts": len(texts),
        "threads": config.threads,
        "precision": resolve_precision(config.precision, torch.device("cpu")),
        **median,
        "ratio": median["student"] / median["teacher"],
    }
