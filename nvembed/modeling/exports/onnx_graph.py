"""ONNX: one graph from token ids to token states and unit vectors, for poolings that need no code of ours.

    model.onnx    input_ids, attention_mask [batch, sequence] -> last_hidden_state, sentence_embedding

Both axes are free. Made by `torch.onnx.export` (the torch.export based one); int8 is onnxruntime's dynamic
quantisation of the same graph, weights per channel. Needs the extra `onnx`.
Shapes: N texts, L tokens, D width.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nvembed.modeling.config import LastTokenConfig
from nvembed.modeling.embedder import Embedder
from nvembed.modeling.exports.parity import ParityError
from nvembed.modeling.pooling import last_token_pool, mean_pool, normalise
from nvembed.modeling.sentence_folder import needs_code
from nvembed.types import UserError

ONNX_FILE = "model.onnx"
OPSET = 18
INPUTS, OUTPUTS = ("input_ids", "attention_mask"), ("last_hidden_state", "sentence_embedding")
_WHOLE_FILE = 3 << 29  # protobuf ends at 2 GB; larger weights go beside the graph


class _Graph(nn.Module):
    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.backbone = embedder.embedding_model
        self.last = isinstance(embedder.config.pooling, LastTokenConfig)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states_NLD = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        pool = last_token_pool if self.last else mean_pool
        return states_NLD, normalise(pool(states_NLD, attention_mask))


def write_onnx(embedder: Embedder, folder: Path, *, int8: bool) -> None:
    """Write `model.onnx` into a folder.

    Raises:
        UserError: the pooling needs code of ours, or the packages of the extra `onnx` are not installed.
        ParityError: attention of the graph is not that of the model (a later token moves, or does not move, an
            earlier state).
    """
    if needs_code(embedder.config):
        raise UserError(
            f"ONNX is for models that pool over everything; this one has {embedder.config.pooling.type} pooling"
            f"{' without the instruction' if embedder.config.text.mask_instruction else ''}. Export a student."
        )
    require_onnx()
    if not int8:
        _trace(embedder, folder / ONNX_FILE)
        check_attention(embedder, open_session(folder / ONNX_FILE))
        return
    with tempfile.TemporaryDirectory(prefix="nvembed-onnx-") as temporary:
        whole = Path(temporary, ONNX_FILE)
        _trace(embedder, whole)
        # Looked at before: int8 takes one scale for all tokens of a text, so each of them moves all others a little.
        check_attention(embedder, open_session(whole))
        _quantise(whole, folder / ONNX_FILE)


def require_onnx() -> None:
    """Raise UserError where a package of the extra `onnx` is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"exporting to ONNX needs {error.name}: pip install 'nvembed[onnx]'") from error


def _trace(embedder: Embedder, target: Path) -> None:
    example = embedder.tokeniser.collate(embedder.tokeniser.encode(["one text", "another, longer text"], ["", ""]))
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    weight_bytes = sum(parameter.numel() * 4 for parameter in embedder.parameters())
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            _Graph(embedder).eval(),
            tuple(example[name] for name in INPUTS),
            str(target),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_shapes={name: {0: batch, 1: sequence} for name in INPUTS},
            external_data=weight_bytes > _WHOLE_FILE,
            verbose=False,
        )


def _quantise(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    beside = source.with_name(f"{source.name}.data").exists()
    with _quiet():
        quantize_dynamic(
            str(source), str(target), weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=beside
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's and the quantiser's remarks about packages that are not needed."""
    root = logging.getLogger()
    level = root.level
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in noisy]
    root.setLevel(logging.ERROR)
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
        for logger, before in zip(noisy, levels, strict=True):
            logger.setLevel(before)


def open_session(path: Path) -> Any:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_attention(embedder: Embedder, session: Any) -> None:
    """Raise ParityError unless a later token moves an earlier state exactly where it does in the model.

    Looked at with and without padding, which take different paths in transformers.
    """
    for mask in ([1, 1, 1], [1, 1, 1, 0]):
        first, second = (
            session.run(
                [OUTPUTS[0]],
                {
                    "input_ids": np.array([ids[: len(mask)]], dtype=np.int64),
                    "attention_mask": np.array([mask], dtype=np.int64),
                },
            )[0][0, 0]
            for ids in ([5, 6, 7, 4], [5, 8, 9, 4])
        )
        moved = not np.array_equal(first, second)
        if moved != embedder.config.bidirectional:
            direction = "bidirectional" if moved else "causal"
            raise ParityError(
                f"the exported graph's attention is {direction} {'with' if 0 in mask else 'without'} padding"
            )


def onnx_encode(embedder: Embedder, session: Any, texts: Sequence[str], instructions: Sequence[str]) -> np.ndarray:
    """Unit vectors [N, D] by the session, token ids by the model's own tokeniser."""
    inputs = embedder.tokeniser.collate(embedder.tokeniser.encode(texts, instructions))
    (vectors_ND,) = session.run([OUTPUTS[1]], {name: inputs[name].numpy() for name in INPUTS})
    return np.asarray(vectors_ND)
