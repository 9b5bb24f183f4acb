"""The steps that a pipeline is made of, by where they are defined.

A step's module may load torch, which takes seconds. A pipeline file lists steps without loading them; a run loads each
one when it reaches it. A step of your own is a `nvembed.core.steps.Step` and is used in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvembed.core.steps import Step


@dataclass(frozen=True)
class StepReference:
    """A `Step` by its module and its name there."""

    module: str
    name: str

    def load(self) -> Step:
        """Import the step."""
        step: Step = getattr(import_module(self.module), self.name)
        return step


PREPARE = StepReference("nvembed.data.prepare", "PREPARE")
MINE = StepReference("nvembed.mining.step", "MINE")
STREAM = StepReference("nvembed.stream.steps", "STREAM")
INITIALISE = StepReference("nvembed.training.initialise", "INITIALISE")
TRAIN = StepReference("nvembed.training.launch", "TRAIN")
BASELINES = StepReference("nvembed.evaluation.baselines", "BASELINES")
EVALUATE = StepReference("nvembed.evaluation.run", "EVALUATE")

TEACHER_EMBEDDINGS = StepReference("nvembed.distill.teacher_embeddings", "TEACHER_EMBEDDINGS")
STUDENT_INIT = StepReference("nvembed.training.initialise", "STUDENT_INIT")
DISTILL_STREAM = StepReference("nvembed.stream.steps", "DISTILL_STREAM")
COMPARE_STUDENT = StepReference("nvembed.distill.student", "COMPARE_STUDENT")

IMPORT_MODEL = StepReference("nvembed.pipeline.import_model", "IMPORT_MODEL")
REGISTER = StepReference("nvembed.registry.step", "REGISTER")


def load_step(step: Step | StepReference) -> Step:
    """The step itself."""
    return step.load() if isinstance(step, StepReference) else step
