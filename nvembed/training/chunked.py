"""Loss and gradient of one global batch within a token budget (gradient cache, Gao et al. 2021, arXiv 2101.06983).

With one chunk per rank this is a plain forward and backward. With more, every chunk is embedded without a graph; the
objective is differentiated at those embeddings; then each chunk is embedded again, with the same random numbers, and
its share of the gradient pushed back. The gradient is the same; memory is that of one chunk.
"""

from __future__ import annotations

import torch

from nvembed.text.tokenise import Tokeniser
from nvembed.training.engine import Engine
from nvembed.training.model import Inputs
from nvembed.training.sharding import Sharding

RngState = tuple[torch.Tensor, torch.Tensor | None]


def backward_global_batch(engine: Engine, sharding: Sharding, tokeniser: Tokeniser) -> torch.Tensor:
    """Leave the gradient of the global loss in the engine.

    Engines average over ranks while the parts of the loss add up, hence the factor `world_size`.

    Returns:
        This rank's part of the loss, detached (parts add up to the global loss).
    """
    inputs = [_chunk_inputs(sharding, i, tokeniser, engine.device) for i in range(len(sharding.own_chunks))]
    counts = [sum(count for _, count in chunk) for chunk in inputs]
    if len(inputs) == 1:
        part = engine.forward("whole", inputs=inputs[0], sharding=sharding)
        engine.backward(part * sharding.world_size)
        return part.detach()
    states, embeddings = [], []
    with torch.no_grad():
        for chunk in inputs:
            states.append(_rng_state(engine.device))
            embeddings.append(engine.forward("embed", inputs=chunk))
    leaf_ND = torch.cat(embeddings).requires_grad_()
    with engine.multi_backward():
        part = engine.forward("objective", local_ND=leaf_ND, sharding=sharding)
        engine.backward(part * sharding.world_size)
        assert leaf_ND.grad is not None
        gradients = leaf_ND.grad.split(counts)
        for chunk, state, gradient_ND in zip(inputs, states, gradients, strict=True):
            _restore_rng(state, engine.device)
            engine.backward(engine.forward("surrogate", inputs=chunk, gradient_ND=gradient_ND))
    return part.detach()


def _chunk_inputs(sharding: Sharding, index: int, tokeniser: Tokeniser, device: torch.device) -> Inputs:
    """Model input of one chunk; a tiny text for an empty slice, as ZeRO-3 needs equally many forwards everywhere."""
    batch = sharding.batch
    inputs = []
    for part in sharding.own_chunks[index]:
        texts = [batch.texts[t] for t in part] or ["."]
        instructions = [batch.instructions[t] for t in part] or [""]
        inputs.append((tokeniser.collate(tokeniser.encode(texts, instructions), device=device), len(part)))
    return inputs


def _rng_state(device: torch.device) -> RngState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_rng(state: RngState, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
