"""The student: teacher embeddings (written once) -> train student -> evaluate -> register.

    python pipelines/distill.py [RECIPE] [--set teacher=models:/nvembed-teacher@champion] [--out URI] [--dry-run]

The student is the teacher's first layers, mean pooled; it learns to give the teacher's embeddings.
"""

from nvembed.pipeline.command_line import main
from nvembed.pipeline.declaration import Pipeline
from nvembed.pipeline.run import PipelineRun
from nvembed.pipeline.steps import (
    COMPARE_STUDENT,
    DISTILL_STREAM,
    EVALUATE,
    PREPARE,
    STUDENT_INIT,
    TEACHER_EMBEDDINGS,
    TRAIN,
)


def distill(run: PipelineRun) -> None:
    """Train a student of an existing teacher."""
    recipe, student = run.recipe, run.recipe.student
    prepared = run.step("prepare", PREPARE, recipe.prepare)
    teacher = run.import_model("teacher", recipe.teacher)
    embeddings = run.step(
        "teacher_embeddings", TEACHER_EMBEDDINGS, recipe.teacher_embeddings, prepare=prepared, model=teacher
    )

    before = run.step("student_init", STUDENT_INIT, student.init, model=teacher)
    run.step("evaluate_student_init", EVALUATE, student.evaluate, prepare=prepared, model=before)
    stream = run.step("stream_student", DISTILL_STREAM, student.stream, teacher_embeddings=embeddings, model=before)
    after = run.step("train_student", TRAIN, student.train, stream=stream, model=before)

    scores = run.step("evaluate_student", EVALUATE, student.evaluate, prepare=prepared, model=after)
    models = {"teacher": teacher, "before": before, "student": after}
    run.step("compare_student", COMPARE_STUDENT, student.compare, teacher_embeddings=embeddings, **models)
    run.register("register_student", recipe.register.student_name, model=after, scores=scores)
    run.report()


PIPELINE = Pipeline(distill, recipe="distill.yaml", needs=("teacher", "teacher_embeddings", "student"))

if __name__ == "__main__":
    raise SystemExit(main(PIPELINE))
