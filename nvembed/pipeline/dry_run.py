"""The dry run of a pipeline: what each step would do, without touching anything."""

from __future__ import annotations

from dataclasses import dataclass, field

from nvembed.core import storage
from nvembed.core.steps import REPORT_JSON, STARTED, Step
from nvembed.pipeline.run import IMPORT_MODEL, import_config
from nvembed.recipe.schema import Recipe
from nvembed.registry.step import REGISTER, registration_config
from nvembed.tracking.store import resolve_store
from nvembed.types import Artifact, Config


@dataclass(frozen=True)
class PlannedStep:
    """What would happen to a step: `skip`, `resume`, `run`; `unknown` where the output cannot be reached."""

    name: str
    what: str
    uri: str


@dataclass
class PlannedRoad:
    """A road that looks and never touches; `steps` says what a run would do.

    Attributes:
        unreachable: why the output cannot be looked at from here; None when it can.
    """

    recipe: Recipe
    out: str
    unreachable: str | None = None
    steps: list[PlannedStep] = field(default_factory=list)

    def step(self, name: str, step: Step, config: Config, **inputs: Artifact) -> Artifact:
        """See `Road.step`; an artifact that is not there yet has an empty manifest."""
        uri = storage.join(self.out, name)
        if self.unreachable:
            self.steps.append(PlannedStep(name, "unknown", uri))
            return Artifact(uri, {})
        known = all(artifact.manifest for artifact in inputs.values())
        artifact = step.find(config, inputs, uri) if known else None
        working = not step.cleared and storage.exists(storage.join(uri, STARTED))
        self.steps.append(PlannedStep(name, "skip" if artifact else "resume" if working else "run", uri))
        return artifact or Artifact(uri, {})

    def register(self, name: str, model_name: str, *, model: Artifact, scores: Artifact) -> Artifact | None:
        """See `Road.register`."""
        recipe = self.recipe
        if not recipe.register.enabled:
            return None
        if self.unreachable:  # which registry depends on what kind of storage it is
            self.steps.append(PlannedStep(name, "unknown", storage.join(self.out, name)))
            return None
        store = resolve_store(recipe.tracking.uri, self.out)
        config = registration_config(
            recipe.register, model_name, recipe.name, recipe.tracking.experiment, store, run_id=None
        )
        return self.step(name, REGISTER, config, model=model, scores=scores)

    def import_model(self, name: str, reference: str) -> Artifact:
        """See `Road.import_model`."""
        return self.step(name, IMPORT_MODEL, import_config(reference, self.recipe.tracking.uri))

    def report(self) -> None:
        """See `Road.report`."""
        self.steps.append(PlannedStep("report", "run", storage.join(self.out, REPORT_JSON)))
