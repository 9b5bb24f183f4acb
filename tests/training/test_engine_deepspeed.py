"""Pieces of a whole tensor under ZeRO-3.

Every ZeRO stage on two ranks equals the torch engine: test_equality.py. Resumes: test_resume.py. The configuration
DeepSpeed gets: tests/plan/test_sizes.py.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nvembed.training.engine_deepspeed import _own_partition


@pytest.mark.parametrize(("numbers", "world"), [(6, 2), (7, 2), (7, 3), (1, 4)])
def test_partitions_of_a_tensor_are_padded_with_zeros(
    numbers: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = -(-numbers // world)
    whole = torch.arange(1.0, numbers + 1).reshape(numbers, 1)
    parameter = SimpleNamespace(ds_tensor=torch.empty(size))
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    pieces = []
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        pieces.append(_own_partition(whole, parameter))
    assert all(len(piece) == size for piece in pieces)
    assert torch.equal(torch.cat(pieces)[:numbers], whole.flatten())
    assert not torch.cat(pieces)[numbers:].any()
