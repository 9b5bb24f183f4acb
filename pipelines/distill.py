"""The student: teacher_embeddings (teacher vectors, written once) -> train student -> evaluate -> register.

    python pipelines/distill.py [RECIPE] [--set teacher=models:/nvembed-teacher@champion] [--out URI] [--dry-run]

The student is the teacher's first layers, mean pooled; it learns to point where the teacher points.
"""

import nvembed.pipeline.early  # isort: skip  # noqa: F401  (first: Ctrl-C while the rest loads ends quietly)

from nvembed.data.prepare import PREPARE
from nvembed.distill.student import COMPARE_STUDENT
from nvembed.distill.teacher_embeddings import TEACHER_EMBEDDINGS
from nvembed.evaluation.run import EVALUATE
from nvembed.pipeline.command_line import tell
from nvembed.pipeline.run import Road
from nvembed.stream.steps import DISTILL_STREAM
from nvembed.training.initialise import STUDENT_INIT
from nvembed.training.launch import TRAIN
from nvembed.types import Artifact


def train_student(road: Road, prepared: Artifact, teacher: Artifact) -> Artifact:
    """Walk the road from a teacher to its student; returns the student's artifact (model folder at `model/`)."""
    recipe, student = road.recipe, road.recipe.student
    taught = road.step(
        "teacher_embeddings", TEACHER_EMBEDDINGS, recipe.teacher_embeddings, prepare=prepared, model=teacher
    )
    before = road.step("student_init", STUDENT_INIT, student.init, model=teacher)
    road.step("evaluate_student_init", EVALUATE, student.evaluate, prepare=prepared, model=before)

    stream = road.step("stream_student", DISTILL_STREAM, student.stream, teacher_embeddings=taught, model=before)
    after = road.step("train_student", TRAIN, student.train, stream=stream, model=before)

    scores = road.step("evaluate_student", EVALUATE, student.evaluate, prepare=prepared, model=after)
    road.step(
        "compare_student",
        COMPARE_STUDENT,
        student.compare,
        teacher_embeddings=taught,
        teacher=teacher,
        before=before,
        student=after,
    )
    road.register("register_student", recipe.register.student_name, model=after, scores=scores)
    return after


def distill(road: Road) -> None:
    """The whole story of one student of an existing teacher."""
    prepared = road.step("prepare", PREPARE, road.recipe.prepare)
    train_student(road, prepared, road.import_model("teacher", road.recipe.teacher))
    road.report()


if __name__ == "__main__":
    raise SystemExit(tell(distill, default="distill.yaml", needs=("teacher", "teacher_embeddings", "student")))
