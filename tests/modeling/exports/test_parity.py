"""Differences between the vectors of a model and of its export."""

import numpy as np
import pytest

from nvembed.modeling.exports.parity import Parity, ParityError, compare, refuse_beyond


def test_parity_counts_what_differs():
    first = np.eye(3, dtype=np.float32)
    second = first.copy()
    second[1] = [0.6, 0.8, 0]
    assert compare(first, first) == Parity(3, 0.0, 1.0)
    found = compare(first, second)
    assert found.max_difference == pytest.approx(0.6) and found.min_cosine == pytest.approx(0.8)
    with pytest.raises(ParityError, match=r"largest difference 0\.6"):
        refuse_beyond({"probes": compare(first, first), "given": found}, 1e-4, "it")
    with pytest.raises(ParityError, match="finite"):
        compare(first, np.full((3, 3), np.nan, dtype=np.float32))
