"""The gate over plain data: every check refuses what it is for, all refusals come at once."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvembed.registry.config import GateConfig
from nvembed.registry.gate import CHECKS, Comparison, Evidence, passed, refusals, run_gate

HASHES = {"cwe": "a", "hpo": "b"}


def delta(value: float, half: float = 0.005) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def against(mean: float, cwe: float | None = None, hpo: float | None = None, **changes: Any) -> Comparison:
    sets = {
        "cwe": ("ndcg_at_10", delta(mean if cwe is None else cwe)),
        "hpo": ("ndcg_at_10", delta(mean if hpo is None else hpo)),
    }
    return replace(Comparison("3", HASHES, delta(mean), sets), **changes)


GOOD = Evidence(
    evaluation=HASHES,
    primary={"cwe": ("ndcg_at_10", 0.5), "hpo": ("ndcg_at_10", 0.6)},
    expected=HASHES,
    comparison=against(0.02),
    near_duplicates={"cwe": 0, "hpo": 0},
    unmeasured=(),
    probes="",
    chain=(),
)


def states(evidence: Evidence, config: GateConfig | None = None) -> dict[str, str]:
    return {check.name: check.state for check in run_gate(evidence, config or GateConfig())}


def refused(evidence: Evidence, config: GateConfig | None = None) -> set[str]:
    return {name for name, state in states(evidence, config).items() if state == "refused"}


def test_a_better_version_passes_everything() -> None:
    assert states(GOOD) == dict.fromkeys(CHECKS, "passed")
    assert passed(run_gate(GOOD, GateConfig()))


def test_the_first_version_is_not_compared() -> None:
    assert states(replace(GOOD, comparison=None)) == {
        **dict.fromkeys(CHECKS, "passed"),
        "comparison": "skipped",
        "floor": "skipped",
    }
    assert not passed([])


@pytest.mark.parametrize(
    ("evidence", "check", "message"),
    [
        (replace(GOOD, evaluation={"cwe": "a"}), "evaluation", "hpo was held out and not scored"),
        (replace(GOOD, evaluation={**HASHES, "hpo": "x"}), "evaluation", "hpo was not scored on what `prepare`"),
        (replace(GOOD, primary={"cwe": ("ndcg_at_10", 0.5)}), "evaluation", "no scores of hpo"),
        (replace(GOOD, comparison=against(0.02, evaluation={**HASHES, "hpo": ""})), "evaluation", "differ of hpo"),
        (replace(GOOD, comparison=against(0.02, evaluation={**HASHES, "new": "x"})), "evaluation", "differ of new"),
        (replace(GOOD, comparison=against(-0.01, cwe=0.0, hpo=-0.02)), "comparison", "-1.0 points [-1.5, -0.5]: not"),
        (replace(GOOD, comparison=Comparison("3", HASHES, problem="no items")), "comparison", "no items"),
        (replace(GOOD, comparison=against(0.02, cwe=-0.04)), "floor", "cwe: ndcg_at_10 -4.0 points"),
        (replace(GOOD, near_duplicates={"cwe": 0, "hpo": 2}), "leak", "nearly copy a held-out text: hpo 2"),
        (replace(GOOD, near_duplicates=None), "leak", "were not counted"),
        (replace(GOOD, probes="other vectors"), "probes", "other vectors"),
        (replace(GOOD, chain=("mine: gone", "train: changed")), "provenance", "mine: gone; train: changed"),
    ],
)  # fmt: skip
def test_each_check_refuses_what_it_is_for(evidence: Evidence, check: str, message: str) -> None:
    results = {result.name: result for result in run_gate(evidence, GateConfig())}
    assert refused(evidence) == {check}
    assert message in results[check].message and results[check].message in refusals(list(results.values()))


def test_all_refusals_come_at_once() -> None:
    bad = Evidence({}, {}, HASHES, against(-0.2), None, (), "no", ("cut",))
    assert refused(bad) == set(CHECKS)
    assert len(refusals(run_gate(bad, GateConfig())).splitlines()) == len(CHECKS)


def test_margin_and_floors_are_the_recipes() -> None:
    slightly_worse = replace(GOOD, comparison=against(-0.003))
    assert refused(slightly_worse) == set()
    assert refused(slightly_worse, GateConfig(margin=0.005)) == {"comparison"}
    assert refused(replace(GOOD, comparison=against(0.0, hpo=-0.001)), GateConfig(margin=0)) == {"comparison"}
    assert refused(GOOD, GateConfig(floors={"cwe": 0.55})) == {"floor"}
    assert refused(replace(GOOD, comparison=None), GateConfig(floors={"cwe": 0.45})) == set()
    assert refused(GOOD, GateConfig(floors={"cew": 0.1})) == {"floor"}


def test_what_an_imported_model_learned_from_is_said_not_refused() -> None:
    result = next(
        check
        for check in run_gate(replace(GOOD, unmeasured=("models:/t@champion",)), GateConfig())
        if check.name == "leak"
    )
    assert result.passed and "what models:/t@champion was trained on is not measured" in result.message


@given(st.floats(-0.2, 0.2), st.floats(0, 0.1), st.floats(0, 0.1), st.floats(0, 0.1))
def test_a_wider_margin_never_refuses_more(mean: float, half: float, margin: float, more: float) -> None:
    comparison = Comparison("1", HASHES, delta(mean, half), {"cwe": ("accuracy", delta(0.0))})
    narrow, wide = (
        refused(replace(GOOD, comparison=comparison), GateConfig(margin=m)) for m in (margin, margin + more)
    )
    assert wide <= narrow
    if mean - half > 0:
        assert not narrow
    if mean - half < -margin - more:
        assert wide == {"comparison"}
