"""Execution of one pipeline step: skip, resume or build it, with its records, memory, MLflow run and heartbeat."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from nvembed.core import storage
from nvembed.core.lease import check_fence
from nvembed.core.runtime import give_back
from nvembed.core.steps import METRICS, STARTED, Step, remove_working_files
from nvembed.core.terminal import Console, adopt_loggers
from nvembed.pipeline.attempts import Records
from nvembed.pipeline.log import Heartbeat
from nvembed.pipeline.memory_meter import MemoryMeter
from nvembed.pipeline.signals import Interrupts
from nvembed.pipeline.steps import StepReference, load_step
from nvembed.recipe.schema import Recipe
from nvembed.registry.client import RegistryAwayError
from nvembed.tracking.tracker import Tracker
from nvembed.types import Artifact, Config, UserError

WITHOUT_RAY = ("prepare", "initialise", "student_init", "register", "import_model")  # spares them Ray's 5 s and 0.5 GiB
StepConfig = Callable[[str | None], Config]


class StepFailedError(RuntimeError):
    """A pipeline step failed; the cause says why."""


@dataclass
class StepRunner:
    """Runs steps below one output, under the lease with this fencing number."""

    recipe: Recipe
    out: str
    fence: int
    meter: MemoryMeter
    tracker: Tracker
    records: Records
    console: Console
    interrupts: Interrupts

    def run(
        self, name: str, step: Step | StepReference, config: StepConfig, inputs: Mapping[str, Artifact]
    ) -> Artifact:
        """The step's artifact at `<out>/<name>`, as published before or built now; see `PipelineRun.step`.

        Args:
            name: directory below the output.
            step: the step.
            config: its config, given the id of the MLflow run (None where it does not matter).
            inputs: artifacts by input name.
        """
        self.interrupts.check()
        uri = storage.join(self.out, name)
        with self.failures(name):
            loaded, settled = load_step(step), config(None)
            artifact = loaded.find(settled, inputs, uri)
            if artifact is None:
                return self._build(name, loaded, config, inputs, uri)
            remove_working_files(uri)
            with self.tracker.step(name, settled, inputs) as run:
                run.finish(artifact)
            self._note(name, "skipped", artifact.manifest["timing"]["seconds"], None, uri)
            self.console.line(f"{name}: skipped, unchanged")
            return artifact

    def _build(self, name: str, step: Step, config: StepConfig, inputs: Mapping[str, Artifact], uri: str) -> Artifact:
        resumed = not step.cleared and storage.exists(storage.join(uri, STARTED))
        self.console.line(f"{name}: {'resumes' if resumed else 'starts'}")
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
                        self._start_ray(step)
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
    def failures(self, name: str) -> Iterator[None]:
        """Users' mistakes and interrupts pass as they are; any other error becomes a `StepFailedError` of `name`."""
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
            if self.interrupts.requested or (isinstance(error, SystemExit) and error.code == signal.SIGTERM):
                raise KeyboardInterrupt from error
            raise
        finally:
            self.interrupts.arm()

    def _start_ray(self, step: Step) -> None:
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
