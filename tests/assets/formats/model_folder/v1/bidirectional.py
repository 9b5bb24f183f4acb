"""Bidirectional attention in decoders, by the one switch that is right everywhere: `config.is_causal`.

transformers' mask builders and attention calls read it (5.2 and later), for Llama, Mistral, Qwen2, Qwen3 alike, under
sdpa and eager. Setting `module.is_causal` instead would, under sdpa, turn unpadded batches bidirectional and leave
padded ones causal without a word. A model with windowed attention (Mistral-7B-v0.1: 4,096) is bidirectional *within
the window*, not beyond it.

torch only: this file is copied into model folders (see `export.py`).
"""

from __future__ import annotations

from typing import Any

import torch


def set_bidirectional(model: Any, bidirectional: bool) -> None:
    """Switch every layer of a decoder; the choice is saved in its `config.json`.

    Causal means that the key is absent, as in any decoder's own config.
    """
    if bidirectional:
        model.config.is_causal = False
    else:
        model.config.__dict__.pop("is_causal", None)


@torch.no_grad()
def attends_ahead(model: Any) -> bool:
    """Whether a later token changes an earlier token's state, as it does in a bidirectional model only.

    Raises:
        ValueError: padded and unpadded batches disagree: the switch reached one path of the library and not the other.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    moved = []
    try:
        for mask in ([1, 1, 1], [1, 1, 1, 0]):
            # One text per forward of the same shape: a causal model's first states are then equal to the bit.
            first, second = (
                model(
                    input_ids=torch.tensor([ids[: len(mask)]], device=device),
                    attention_mask=torch.tensor([mask], device=device),
                    use_cache=False,
                ).last_hidden_state[0, 0]
                for ids in ([5, 6, 7, 4], [5, 8, 9, 4])
            )
            moved.append(not torch.equal(first, second))
    finally:
        model.train(was_training)
    if moved[0] != moved[1]:
        raise ValueError(
            f"{type(model).__name__}: attention is {'bidirectional' if moved[0] else 'causal'} without padding and "
            f"{'bidirectional' if moved[1] else 'causal'} with it. The installed transformers cannot run this model."
        )
    return moved[0]
