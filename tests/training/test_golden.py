"""The numbers of training do not change unnoticed."""

import json

import pytest
from golden import ASSET, RUNS, STEPS, measure


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_stored_ones(name: str) -> None:
    golden = json.loads(ASSET.read_text())
    assert set(golden["losses"]) == set(RUNS), f"regenerate with: {golden['command']}"
    expected = golden["losses"][name]
    assert len(expected) == STEPS
    assert measure(name) == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == STEPS
