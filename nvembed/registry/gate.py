"""The gate before `champion`: pure checks over plain data; all of them run every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nvembed.registry.config import GateConfig

Interval = Mapping[str, float]  # value, low, high
NOT_COUNTED = (
    "near duplicates between its training data and its evaluation data were not counted: they are not of one `prepare`"
)
CHECKS = ("evaluation", "comparison", "floor", "leak", "probes", "provenance")


@dataclass(frozen=True)
class Check:
    """The result of one check. `passed` None: it was skipped; `message` says why."""

    name: str
    passed: bool | None
    message: str

    @property
    def state(self) -> str:
        """passed, refused or skipped."""
        return {True: "passed", False: "refused", None: "skipped"}[self.passed]


@dataclass(frozen=True)
class Comparison:
    """Paired differences to the champion, or why there are none.

    Attributes:
        version: the champion.
        evaluation: its data sets and their hashes.
        mean: candidate - champion, mean over the data sets of the primary metric.
        datasets: the same by data set: (metric, difference).
        problem: why the two cannot be compared item by item; empty when they can.
    """

    version: str
    evaluation: Mapping[str, str]
    mean: Interval | None = None
    datasets: Mapping[str, tuple[str, Interval]] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True)
class Evidence:
    """The input of the gate.

    Attributes:
        evaluation: data set -> hash, of what was scored.
        primary: data set -> (metric, score) of the candidate.
        expected: data set -> hash of every held-out set of the chain; None where there is no chain.
        comparison: None where there is no champion.
        near_duplicates: data set -> train examples that nearly copy a held-out text; None where they were not counted.
        unmeasured: models that the candidate started from whose training data is unknown.
        probes: "" when files, loading and probe vectors are right, else the error; None: not run.
        chain: problems of the hash chain.
        reigning: the candidate is the champion itself.
    """

    evaluation: Mapping[str, str]
    primary: Mapping[str, tuple[str, float]]
    expected: Mapping[str, str] | None
    comparison: Comparison | None
    near_duplicates: Mapping[str, int] | None
    unmeasured: Sequence[str]
    probes: str | None
    chain: Sequence[str]
    reigning: bool = False


def run_gate(evidence: Evidence, config: GateConfig) -> list[Check]:
    """Every check's result, in the order of `CHECKS`."""
    checks = (_evaluation, _comparison, _floor, _leak, _probes, _provenance)
    return [check(evidence, config) for check in checks]


def passed(checks: Sequence[Check]) -> bool:
    """Whether no check refused and the ones that must be run were."""
    return all(check.passed is not False for check in checks) and bool(checks)


def refusals(checks: Sequence[Check]) -> str:
    """The failed checks, a line each."""
    return "\n".join(f"  {check.name}: {check.message}" for check in checks if check.passed is False)


def as_plain(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """The results as JSON values."""
    return [{"name": check.name, "state": check.state, "said": check.message} for check in checks]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(sorted(names))


def _evaluation(evidence: Evidence, _: GateConfig) -> Check:
    problems = []
    ours = evidence.evaluation
    unscored = [name for name in ours if name not in evidence.primary]
    if not evidence.primary:
        problems.append("nothing was scored")
    if unscored:
        problems.append(f"no scores of {_listed(unscored)}")
    if evidence.expected is not None:
        missing = [name for name in evidence.expected if name not in ours]
        other = [name for name, digest in evidence.expected.items() if name in ours and ours[name] != digest]
        if missing:
            problems.append(f"not complete: {_listed(missing)} was held out and not scored")
        if other:
            problems.append(f"{_listed(other)} was not scored on what `prepare` held out (hashes differ)")
    if evidence.comparison is not None:
        theirs = evidence.comparison.evaluation
        differing = [name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)]
        if differing:
            problems.append(
                f"champion {evidence.comparison.version} was scored on other evaluation sets "
                f"(the hashes differ of {_listed(differing)}): evaluate both on the same ones"
            )
    same = f", the same as champion {evidence.comparison.version}'s" if evidence.comparison else ""
    return Check("evaluation", not problems, "; ".join(problems) or f"{len(ours)} data sets{same}")


def points(value: float) -> str:
    """A score difference in points of 100: +1.2."""
    return f"{100 * value:+.1f}"


def _difference(delta: Interval) -> str:
    return f"{points(delta['value'])} points [{points(delta['low'])}, {points(delta['high'])}]"


def _no_champion(evidence: Evidence) -> str:
    return "it is the champion itself" if evidence.reigning else "there is no champion"


def _comparison(evidence: Evidence, config: GateConfig) -> Check:
    comparison = evidence.comparison
    if comparison is None:
        return Check("comparison", None, _no_champion(evidence))
    if comparison.mean is None:
        return Check("comparison", False, comparison.problem or "it cannot be compared with the champion")
    against = f"mean difference to champion {comparison.version} {_difference(comparison.mean)}"
    if comparison.mean["low"] > 0:
        return Check("comparison", True, f"{against}: better")
    if config.margin > 0 and comparison.mean["low"] >= -config.margin:
        return Check("comparison", True, f"{against}: not worse by more than {100 * config.margin:g}")
    allowed = f"its lower end may be {points(-config.margin)} at least" if config.margin else "it must be above 0"
    return Check("comparison", False, f"{against}: not better, and {allowed} (register.gate.margin)")


def _floor(evidence: Evidence, config: GateConfig) -> Check:
    problems = [
        f"{name}: {metric} {value:.4f}, below its floor {config.floors[name]:g} (register.gate.floors)"
        for name, (metric, value) in evidence.primary.items()
        if name in config.floors and value < config.floors[name]
    ]
    unknown = [name for name in config.floors if name not in evidence.primary]
    problems += [f"{name} has a floor (register.gate.floors) and no score" for name in sorted(unknown)]
    comparison = evidence.comparison
    for name, (metric, delta) in (comparison.datasets if comparison else {}).items():
        if delta["value"] < -config.floor:
            problems.append(
                f"{name}: {metric} {_difference(delta)} against champion {comparison.version if comparison else ''}; "
                f"{points(-config.floor)} is the floor (register.gate.floor)"
            )
    if problems:
        return Check("floor", False, "; ".join(problems))
    if comparison is None and not config.floors:
        return Check("floor", None, f"{_no_champion(evidence)}, and no floors are given")
    return Check("floor", True, "no data set below its floor")


def _leak(evidence: Evidence, _: GateConfig) -> Check:
    if evidence.near_duplicates is None:
        return Check("leak", False, NOT_COUNTED)
    leaking = {name: count for name, count in evidence.near_duplicates.items() if count}
    if leaking:
        listed = ", ".join(f"{name} {count}" for name, count in sorted(leaking.items()))
        return Check("leak", False, f"train examples that nearly copy a held-out text: {listed}")
    message = f"no near duplicate across the split, {len(evidence.near_duplicates)} data sets"
    if evidence.unmeasured:
        message += f"; what {_listed(evidence.unmeasured)} was trained on is not measured"
    return Check("leak", True, message)


def _probes(evidence: Evidence, _: GateConfig) -> Check:
    if evidence.probes is None:
        return Check("probes", None, "not run")
    return Check("probes", not evidence.probes, evidence.probes or "files, loading and probe vectors are right")


def _provenance(evidence: Evidence, _: GateConfig) -> Check:
    return Check("provenance", not evidence.chain, "; ".join(evidence.chain) or "whole, from the data to the folder")
