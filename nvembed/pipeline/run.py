"""A run of a pipeline, as its function sees it: the recipe, the output, and the methods that run steps.

Importing this loads the standard library only, so that a pipeline file loads at once and Ctrl-C ends it quietly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nvembed.pipeline.steps import IMPORT_MODEL, REGISTER, StepReference

if TYPE_CHECKING:
    from nvembed.core.steps import Step
    from nvembed.pipeline.step_runner import StepRunner
    from nvembed.recipe.schema import Recipe
    from nvembed.types import Artifact, Config


@dataclass
class PipelineRun:
    """Runs the steps of a pipeline, one after the other; `DryRun` has the same methods and touches nothing.

    Attributes:
        recipe: the resolved recipe.
        out: absolute path or URI of the output.
        artifacts: what the steps so far published, by step name.
        report_path: the HTML report, once `report` has written it.
    """

    recipe: Recipe
    out: str
    runner: StepRunner
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    report_path: str | None = None
    _pending: dict[str, Callable[[], Artifact]] = field(default_factory=dict)

    def step(self, name: str, step: Step | StepReference, config: Config, **inputs: Artifact) -> Artifact:
        """Run a step, or take what an earlier run published at `<out>/<name>` for the same config and inputs.

        Args:
            name: directory below the output; names the step in the records and in MLflow.
            step: one of `nvembed.pipeline.steps`, or a `Step` of your own.
            config: the step's section of the recipe.
            **inputs: artifacts of earlier steps.

        Returns:
            The step's artifact.

        Raises:
            UserError: the directory belongs to another recipe or is damaged, or the step found a mistake of the user.
            StepFailedError: anything else went wrong.
        """
        self.artifacts[name] = artifact = self.runner.run(name, step, lambda run_id: config, inputs)
        return artifact

    def import_model(self, name: str, reference: str) -> Artifact:
        """Copy a model made elsewhere, a folder or `models:/name@alias`, into an artifact with the folder `model/`."""
        from nvembed.pipeline.import_model import import_config

        return self.step(name, IMPORT_MODEL, import_config(reference, self.recipe.tracking.uri))

    def register(self, name: str, model_name: str, *, model: Artifact, scores: Artifact) -> Artifact | None:
        """Register a model folder as `model_name` with its scores.

        Returns:
            The registration. None when `register.enabled` is false, and when the registry does not answer: no later
            step needs it, so the run continues, tries again before the report, and `finish` raises what is left.
        """
        from nvembed.registry.step import RegistryAwayError, registration_config
        from nvembed.tracking.store import resolve_store

        recipe, console = self.recipe, self.runner.console
        if not recipe.register.enabled:
            console.line(f"{name}: off (register.enabled is false)")
            return None
        store = resolve_store(recipe.tracking.uri, self.out)

        def config(run_id: str | None) -> Config:
            experiment = recipe.tracking.experiment
            return registration_config(recipe.register, model_name, recipe.name, experiment, store, run_id)

        def attempt() -> Artifact:
            inputs = {"model": model, "scores": scores}
            self.artifacts[name] = artifact = self.runner.run(name, REGISTER, config, inputs)
            return artifact

        try:
            artifact = attempt()
        except RegistryAwayError as error:
            self._pending[name] = attempt
            console.line(f"{name}: pending, continuing without it: {error}")
            return None
        registry, wanted = artifact.manifest["metrics"].get("registry", store.configured), store.configured
        if registry != wanted:
            own = "the output's own registry"
            console.alert(f"{name}: stays registered in {registry or own}, where it was done; not in {wanted or own}")
        return artifact

    def _register_pending(self) -> None:
        from nvembed.registry.step import RegistryAwayError

        for name, attempt in list(self._pending.items()):
            try:
                attempt()
            except RegistryAwayError:
                self.runner.console.line(f"{name}: still pending, the registry does not answer")
            else:
                del self._pending[name]

    def report(self) -> None:
        """Write `report.json` and `report.html` of all steps so far; seconds are those of all attempts."""
        from nvembed.report.pages import write_report

        runner = self.runner
        runner.interrupts.check()
        if self._pending:
            self._register_pending()
        runner.records.write(runner.meter.peak_mb)
        with runner.failures("report"):
            self.report_path = write_report(
                self.out,
                self.recipe.name,
                self.recipe.model_dump(mode="json"),
                runner.records.steps(),
                self.artifacts,
                runner.records.wall_seconds,
                runner.records.peak_mb,
            )
        runner.console.line(f"report: {self.report_path} and report.json beside it")

    def finish(self) -> None:
        """Try what is pending once more; called after the pipeline's function.

        Raises:
            PendingError: the registry does not answer.
        """
        from nvembed.pipeline.exit_codes import PendingError

        if self._pending:
            self._register_pending()
        if self._pending:
            raise PendingError(
                f"everything is done but {', '.join(self._pending)}: the model registry does not answer. What is "
                "finished stays; run the same command again when it answers."
            )
