"""The dry run of a pipeline: what each step would do, without touching anything."""

from __future__ import annotations

from dataclasses import dataclass, field

from nvembed.core import storage
from nvembed.core.steps import MANIFEST, REPORT_JSON, STARTED, Step
from nvembed.pipeline.import_model import import_config
from nvembed.pipeline.steps import IMPORT_MODEL, REGISTER, StepReference, load_step
from nvembed.recipe.document import Document
from nvembed.recipe.schema import Recipe
from nvembed.registry.step import registration_config
from nvembed.tracking.store import resolve_store
from nvembed.types import Artifact, Config


@dataclass(frozen=True)
class PlannedStep:
    """A step and its planned action: `skip`, `resume` or `run`; `unknown` where the output cannot be reached."""

    name: str
    what: str
    uri: str


@dataclass
class DryRun:
    """Takes the place of a `PipelineRun` and touches nothing; `steps` lists what a run would do.

    Attributes:
        recipe: the resolved recipe.
        document: the recipe's document, with the place where each value was written.
        out: absolute path or URI of the output.
        unreachable: why the output cannot be read from here; None when it can.
    """

    recipe: Recipe
    document: Document
    out: str
    unreachable: str | None = None
    steps: list[PlannedStep] = field(default_factory=list)

    def step(self, name: str, step: Step | StepReference, config: Config, **inputs: Artifact) -> Artifact:
        """See `PipelineRun.step`; an artifact that is not there yet has an empty manifest."""
        uri = storage.join(self.out, name)
        if self.unreachable:
            self.steps.append(PlannedStep(name, "unknown", uri))
            return Artifact(uri, {})
        started = storage.exists(storage.join(uri, STARTED))
        if not started and not storage.exists(storage.join(uri, MANIFEST)):
            self.steps.append(PlannedStep(name, "run", uri))
            return Artifact(uri, {})
        loaded = load_step(step)
        known = all(artifact.manifest for artifact in inputs.values())
        artifact = loaded.find(config, inputs, uri) if known else None
        resumes = started and not loaded.cleared
        self.steps.append(PlannedStep(name, "skip" if artifact else "resume" if resumes else "run", uri))
        return artifact or Artifact(uri, {})

    def import_model(self, name: str, reference: str) -> Artifact:
        """See `PipelineRun.import_model`."""
        return self.step(name, IMPORT_MODEL, import_config(reference, self.recipe.tracking.uri))

    def register(self, name: str, model_name: str, *, model: Artifact, scores: Artifact) -> Artifact | None:
        """See `PipelineRun.register`."""
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

    def report(self) -> None:
        """See `PipelineRun.report`."""
        self.steps.append(PlannedStep("report", "run", storage.join(self.out, REPORT_JSON)))
