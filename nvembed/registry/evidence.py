"""Evaluation of the gate for a registered version, and the paired comparison of any two versions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvembed.core import storage
from nvembed.core.steps import SCORES
from nvembed.registry import client as tags
from nvembed.registry import provenance as chains
from nvembed.registry.config import GateConfig
from nvembed.registry.gate import Check, Comparison, Evidence, Interval, as_plain, passed, refusals, run_gate
from nvembed.registry.resolve import fetch_version
from nvembed.registry.versions import primary_scores, read_provenance, version_records
from nvembed.types import Artifact, UserError

logger = logging.getLogger(__name__)

_TAG_LIMIT = 4000


@dataclass(frozen=True)
class GateResult:
    """The gate's result for one version.

    Attributes:
        name: registered model.
        version: the candidate.
        champion: the champion that it was compared with; None where there was none.
        checks: every check's result.
    """

    name: str
    version: str
    champion: str | None
    checks: Sequence[Check]

    @property
    def passed(self) -> bool:
        """Whether no check refused."""
        return passed(self.checks)

    def refusal(self) -> str:
        """The message of a refusal: every check that did not pass."""
        return f"version {self.version} of {self.name} does not pass the gate:\n{refusals(self.checks)}"

    def as_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return {"passed": self.passed, "champion": self.champion, "checks": as_plain(self.checks)}


def gate_config(version: Any) -> GateConfig:
    """The recipe's gate, as it was recorded when the version was registered."""
    recorded = tags.json_tag(version, tags.GATE_CONFIG)
    return GateConfig() if recorded is None else GateConfig.model_validate(recorded)


def evaluate_gate(
    client: Any, uri: str, name: str, number: str, config: GateConfig | None = None, *, probes: bool = True
) -> GateResult:
    """Run the gate for a version against today's champion and record the result as its tags `gate.*`.

    Args:
        config: settings instead of the recorded ones.
        probes: load the version's own files and compute its probe vectors (slow and large for a large model).
    """
    version = tags.get_version(client, name, number)
    settings = config or gate_config(version)
    current = tags.aliases(client, name).get(tags.CHAMPION)
    rival = None if current is None or current == number else tags.get_version(client, name, current)
    evidence = replace(_evidence(client, uri, version, rival, settings, probes), reigning=current == number)
    checks = run_gate(evidence, settings)
    result = GateResult(name, number, None if rival is None else str(rival.version), checks)
    values = {f"{tags.GATE}{check.name}": f"{check.state}: {check.message}"[:_TAG_LIMIT] for check in checks}
    values[f"{tags.GATE}result"] = "passed" if result.passed else "refused"
    values[f"{tags.GATE}champion"] = result.champion or "none"
    if current != number:  # a champion keeps the result that made it one
        tags.set_tags(client, version, values)
    return result


def _evidence(client: Any, uri: str, version: Any, rival: Any, config: GateConfig, probes: bool) -> Evidence:
    comparison = None if rival is None else _compared(client, uri, version, rival, config)
    loaded = _probe_problem(client, uri, version) if probes else None
    try:
        with version_records(client, uri, version) as records:
            scores, provenance = storage.read_json(str(records / SCORES)), read_provenance(records)
    except UserError as error:
        hashes = tags.json_tag(version, tags.EVALUATION) or {}
        return Evidence(hashes, {}, None, comparison, None, (), loaded, (str(error),))
    problems = chains.chain_problems(provenance, version.tags.get(tags.CONTENT))
    held_out = chains.evaluated_datasets(provenance)
    together = _prepared_together(provenance)
    known = {**held_out, **chains.training_datasets(provenance)}
    return Evidence(
        evaluation=scores["evaluation_hash"],
        primary=primary_scores(scores),
        expected={name: row["evaluation_hash"] for name, row in held_out.items() if row.get("test")} or None,
        comparison=comparison,
        near_duplicates={name: int(row.get("near_duplicates_left", 0)) for name, row in known.items()}
        if together
        else None,
        unmeasured=chains.imported(provenance),
        probes=loaded,
        chain=problems,
    )


def _prepared_together(provenance: Mapping[str, Any]) -> bool:
    """Whether one `prepare` made both the model's training data and its evaluation data."""
    scores = provenance["nodes"].get(provenance["scores"], {"inputs": {}})
    return scores["inputs"].get("prepare") in chains.reachable(provenance, provenance["model"])


def _probe_problem(client: Any, uri: str, version: Any) -> str:
    """Empty when the version's own files load and give the vectors they were registered with."""
    from nvembed.modeling.folder import load_embedder

    try:
        load_embedder(fetch_version(client, uri, version))
    except UserError as error:
        return str(error)
    except (OSError, ValueError, RuntimeError) as error:  # every error of loading is a refusal with its message
        return f"its files cannot be loaded ({type(error).__name__}: {error})"
    return ""


# -- two versions, item by item -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreDifferences:
    """Paired differences a - b of primary metrics: over all data sets, and of each as (metric, interval)."""

    mean: Interval
    datasets: Mapping[str, tuple[str, Interval]]
    only_one: Sequence[str]


def score_differences(a: Path, b: Path, samples: int, seed: int) -> ScoreDifferences:
    """Paired differences of two versions' records, over the data sets both were scored on.

    Raises:
        UserError: they share none, or one was not scored on the same items.
    """
    from nvembed.evaluation.significance import paired_bootstrap, paired_bootstrap_mean, paired_items

    pairs = list(paired_items(Artifact(str(a), {}), Artifact(str(b), {})))
    if not pairs:
        raise UserError("the two versions share no scored data set")
    intervals = {pair.dataset: (pair.metric, paired_bootstrap(pair, samples, seed)) for pair in pairs}
    scored = [set(primary_scores(storage.read_json(str(records / SCORES)))) for records in (a, b)]
    return ScoreDifferences(paired_bootstrap_mean(pairs, samples, seed), intervals, sorted(scored[0] ^ scored[1]))


def retrieval_interval(client: Any, uri: str, name: str, number: str) -> dict[str, float] | None:
    """Mean nDCG@10 of a version over its retrieval sets with its interval, from the items it carries; None without."""
    from nvembed.evaluation.significance import retrieval_mean

    version = tags.get_version(client, name, number)
    config = gate_config(version)
    try:
        with version_records(client, uri, version) as records:
            mean = retrieval_mean(Artifact(str(records), {}), samples=config.samples, seed=config.seed)
    except UserError as error:
        logger.warning("version %s of %s: no interval for its mean: %s", number, name, error)
        return None
    return None if mean is None else dict(mean)


@contextmanager
def both_records(client: Any, uri: str, a: Any, b: Any) -> Iterator[tuple[Path, Path]]:
    """The records of two versions."""
    with ExitStack() as stack:
        yield tuple(stack.enter_context(version_records(client, uri, version)) for version in (a, b))  # type: ignore[misc]


def _compared(client: Any, uri: str, version: Any, rival: Any, config: GateConfig) -> Comparison:
    hashes = tags.json_tag(rival, tags.EVALUATION) or {}
    number = str(rival.version)
    try:
        with both_records(client, uri, version, rival) as (ours, theirs):
            differences = score_differences(ours, theirs, config.samples, config.seed)
    except UserError as error:
        return Comparison(number, hashes, problem=f"it cannot be compared with champion {number}: {error}")
    return Comparison(number, hashes, differences.mean, differences.datasets)
