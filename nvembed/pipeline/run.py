"""The road of a story: runs, skips or resumes each pipeline step and keeps the records (layer 6).

`Road` walks; `PlannedRoad` has the same methods and only says what would happen, with no side effect.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from nvembed.core import storage
from nvembed.core.lease import check_fence
from nvembed.core.model_cache import written_folder
from nvembed.core.runtime import give_back
from nvembed.core.steps import METRICS, STARTED, Step, StepResult, load_artifact, remove_working_files
from nvembed.core.terminal import Console, adopt_loggers
from nvembed.pipeline.attempts import Records
from nvembed.pipeline.log import Heartbeat
from nvembed.pipeline.memory_meter import MemoryMeter
from nvembed.pipeline.signals import Interrupts
from nvembed.recipe.schema import Recipe
from nvembed.registry.provenance import licences, trace
from nvembed.registry.resolve import hash_folder, resolve_model
from nvembed.registry.step import REGISTER, RegistryAwayError, registration_config
from nvembed.tracking.store import resolve_store
from nvembed.tracking.tracker import Tracker
from nvembed.types import Artifact, Config, UserError

WITHOUT_RAY = ("prepare", "initialise", "student_init", "register", "import_model")  # spares them Ray's 5 s and 0.5 GiB


class ImportConfig(Config):
    """The `import_model` step: a model made elsewhere.

    `content` is None for a registry reference: what an alias named when the run began is what the run keeps using.
    """

    reference: str
    content: str | None
    registry: str | None = Field(None, exclude=True)


def _build_import(config: ImportConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    folder = resolve_model(config.reference, config.registry)
    with written_folder(storage.join(work_uri, "model")) as target:
        shutil.copytree(folder, target)
        files = sum(path.is_file() for path in target.rglob("*"))
        return StepResult(rows={"files": files}, metrics={"licences": _licences_of(folder)})


def _licences_of(folder: str) -> list[dict[str, str]]:
    """What a folder was made from, as the run that it still lies in says; empty for any other folder."""
    try:
        made = load_artifact(str(Path(folder).parent), verify=False)
    except UserError:  # nothing beside it, or another program's manifest: its own card says what is known
        return []
    return licences(trace(made, made))


IMPORT_MODEL = Step("import_model", 1, _build_import)


def import_config(reference: str, registry: str | None) -> ImportConfig:
    if reference.startswith("models:/"):
        return ImportConfig(reference=reference, content=None, registry=registry)
    folder = resolve_model(reference)
    return ImportConfig(reference=folder, content=hash_folder(folder))


class StepFailedError(RuntimeError):
    """A pipeline step failed; the cause says why."""


class PendingError(RuntimeError):
    """The road was walked to its end, but steps wait for somebody who does not answer. Exit code 4."""


@dataclass
class Road:
    """What a story's function is given: the recipe, the output, and the steps."""

    recipe: Recipe
    out: str
    fence: int
    meter: MemoryMeter
    tracker: Tracker
    records: Records
    console: Console
    interrupts: Interrupts
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    pending: dict[str, Callable[[], Artifact]] = field(default_factory=dict)

    def step(self, name: str, step: Step, config: Config, **inputs: Artifact) -> Artifact:
        """The step's artifact at `<out>/<name>`: as it was published before, or built now.

        Args:
            name: directory below the output; names the step in records and MLflow.
            step: what is done.
            config: its section of the recipe.
            **inputs: artifacts of earlier steps.

        Raises:
            UserError: what is there belongs to another recipe or is damaged, or the step found a mistake of the user.
            StepFailedError: anything else went wrong.
        """
        return self._walk(name, step, lambda run_id: config, inputs)

    def register(self, name: str, model_name: str, *, model: Artifact, scores: Artifact) -> Artifact | None:
        """Register a model folder as `model_name` with its scores.

        Returns:
            None when `register.enabled` is false, and when the registry does not answer: nothing later on the road
            needs it, so the road goes on, tries again before the report, and `finish` says what is left.
        """
        recipe = self.recipe
        if not recipe.register.enabled:
            self.console.line(f"{name}: off (register.enabled is false)")
            return None
        store = resolve_store(recipe.tracking.uri, self.out)

        def config(run_id: str | None) -> Config:
            experiment = recipe.tracking.experiment
            return registration_config(recipe.register, model_name, recipe.name, experiment, store, run_id)

        def walk() -> Artifact:
            return self._walk(name, REGISTER, config, {"model": model, "scores": scores})

        try:
            artifact = walk()
        except RegistryAwayError as error:
            self.pending[name] = walk
            self.console.line(f"{name}: waits, the road goes on: {error}")
            return None
        place, chosen = artifact.manifest["metrics"].get("registry", store.configured), store.configured
        if place != chosen:
            own = "the output's own registry"
            self.console.alert(f"{name}: stays registered in {place or own}, where it was done; not in {chosen or own}")
        return artifact

    def _register_pending(self) -> None:
        for name, walk in list(self.pending.items()):
            try:
                walk()
            except RegistryAwayError:
                self.console.line(f"{name}: still waits, the registry does not answer")
            else:
                del self.pending[name]

    def finish(self) -> None:
        """What a story's end asks for.

        Raises:
            PendingError: steps wait for a registry that does not answer.
        """
        self._register_pending()
        if self.pending:
            raise PendingError(
                f"everything is done but {', '.join(self.pending)}: the model registry does not answer. What is "
                "finished stays; run the same command again when it answers."
            )

    def import_model(self, name: str, reference: str) -> Artifact:
        """A copy of a model folder, or of models:/name@alias, as an artifact like those of the training steps."""
        return self.step(name, IMPORT_MODEL, import_config(reference, self.recipe.tracking.uri))

    def report(self) -> None:
        """Write `report.json` and `report.html` of everything walked so far; seconds are those of all attempts."""
        from nvembed.report.write import write_report

        self.interrupts.check()
        self._register_pending()
        self.records.write(self.meter.peak_mb)
        with self._failures("report"):
            page = write_report(
                self.out,
                self.recipe.name,
                self.recipe.model_dump(mode="json"),
                self.records.steps(),
                self.artifacts,
                self.records.wall_seconds,
                self.records.peak_mb,
            )
        self.console.line(f"report: {page} and report.json beside it")

    # -- how a step is walked -----------------------------------------------------------------------------------------

    def _walk(
        self, name: str, step: Step, config: Callable[[str | None], Config], inputs: Mapping[str, Artifact]
    ) -> Artifact:
        self.interrupts.check()
        uri = storage.join(self.out, name)
        with self._failures(name):
            settled = config(None)
            artifact = step.find(settled, inputs, uri)
            if artifact is not None:
                remove_working_files(uri)
                with self.tracker.step(name, settled, inputs) as run:
                    run.finish(artifact)
                self._note(name, "skipped", artifact.manifest["timing"]["seconds"], None, uri)
                self.console.line(f"{name}: skipped, unchanged")
            else:
                artifact = self._build(name, step, config, inputs, uri)
        self.artifacts[name] = artifact
        return artifact

    def _build(
        self, name: str, step: Step, config: Callable[[str | None], Config], inputs: Mapping[str, Artifact], uri: str
    ) -> Artifact:
        resumed = not step.cleared and storage.exists(storage.join(uri, STARTED))
        self.console.line(f"{name}: {'goes on where it was stopped' if resumed else 'starts'}")
        started, status = time.monotonic(), "failed"
        with self.meter.span() as peak:

            def note(as_status: str) -> float:
                seconds = time.monotonic() - started
                self._note(name, as_status, seconds, peak[0], uri)
                return seconds

            note("running")
            try:
                with self.tracker.step(name, config(None), inputs) as run:

                    def tick() -> None:
                        note("running")
                        if storage.exists(storage.join(uri, METRICS)):
                            run.tail()

                    beat = Heartbeat(self.console, name, uri, lambda: self.meter.current_mb, tick)
                    with beat, self._uninterrupted():
                        self._prepare_cluster(step)
                        artifact = step.run(config(run.run_id), inputs, uri, fence=self.fence, guard=self._guard)
                    run.finish(artifact)
                status = "resumed" if resumed else "done"
            except KeyboardInterrupt:
                status = "interrupted"
                raise
            except RegistryAwayError:
                status = "pending"
                raise
            finally:
                self.meter.sample()
                give_back()
                seconds = note(status)
        self.console.line(
            f"{name}: {'done' if status == 'resumed' else status} in {seconds:.1f} s, {peak[0] / 1024:.1f} GiB"
        )
        return artifact

    def _guard(self) -> None:
        check_fence(self.out, self.fence)

    def _note(self, name: str, status: str, seconds: float, peak_mb: float | None, uri: str) -> None:
        self.records.step(name, status, seconds, peak_mb, uri)
        self.records.write(self.meter.peak_mb)

    @contextmanager
    def _failures(self, name: str) -> Iterator[None]:
        """Users' mistakes pass as they are, everything else gets the step's name."""
        try:
            yield
        except (KeyboardInterrupt, UserError):
            raise
        except Exception as error:
            self.interrupts.check()
            cause = getattr(error, "cause", None)  # Ray wraps what a task raised
            if isinstance(cause, UserError):
                raise cause from None
            raise StepFailedError(f"step {name} failed: {type(cause or error).__name__}: {cause or error}") from error

    @contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        """What a library makes of Ctrl-C or SIGTERM (SystemExit, an error of its own) is KeyboardInterrupt again."""
        try:
            yield
        except BaseException as error:
            if self.interrupts.asked or (isinstance(error, SystemExit) and error.code == signal.SIGTERM):
                raise KeyboardInterrupt from error
            raise
        finally:
            self.interrupts.arm()

    def _prepare_cluster(self, step: Step) -> None:
        """Start or join Ray, with the recipe's sizes, before the first step that needs it."""
        if step.kind in WITHOUT_RAY or ("ray" in sys.modules and sys.modules["ray"].is_initialized()):
            return
        import ray  # noqa: F401  (its loggers exist from here on)

        from nvembed.core.ray_cluster import ensure_ray

        adopt_loggers("ray")
        cluster = self.recipe.cluster
        ensure_ray(cluster.local_cpus or logical_cpus(self.recipe), object_store_bytes=cluster.object_store_mb * 2**20)
        self.interrupts.arm()


def logical_cpus(recipe: Recipe) -> int:
    """CPUs that a local Ray declares: room for the recipe's workers and actors beside Ray's own small tasks."""
    trains = [stage.train for stage in (recipe.stage_1, recipe.stage_2, recipe.student) if stage is not None]
    encodes = [recipe.mine.encode, recipe.evaluate.encode, recipe.baselines.evaluate.encode]
    encodes += [
        section.encode for section in (recipe.teacher_embeddings, recipe.student and recipe.student.evaluate) if section
    ]
    workers = [train.num_workers * train.threads_per_worker for train in trains]
    actors = [int(-(-encode.actors * encode.cpus_per_actor // 1)) for encode in encodes]
    return max(os.cpu_count() or 1, *workers, *actors) + 2
