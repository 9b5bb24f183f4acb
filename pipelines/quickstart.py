"""A teacher and its student on one laptop: real text, a real small LLM, about a quarter of an hour.

    python pipelines/quickstart.py [RECIPE] [--set a.b=c] [--out URI] [--dry-run]

`pipelines/recipes/tiny.yaml` runs the same steps with a random 2-layer LLM in a few minutes.
"""

from nvembed.pipeline.command_line import main
from nvembed.pipeline.declaration import Pipeline
from nvembed.pipeline.run import PipelineRun
from nvembed.pipeline.steps import (
    BASELINES,
    COMPARE_STUDENT,
    DISTILL_STREAM,
    EVALUATE,
    INITIALISE,
    MINE,
    PREPARE,
    STREAM,
    STUDENT_INIT,
    TEACHER_EMBEDDINGS,
    TRAIN,
)


def quickstart(run: PipelineRun) -> None:
    """Train a teacher, then its student."""
    recipe = run.recipe
    prepared = run.step("prepare", PREPARE, recipe.prepare)

    # the teacher, as in nv_embed.py
    untrained = run.step("initialise", INITIALISE, recipe.initialise, prepare=prepared)
    mined = run.step("mine", MINE, recipe.mine, prepare=prepared)
    stage_1 = recipe.stage_1
    stream = run.step("stream_stage_1", STREAM, stage_1.stream, prepare=prepared, mine=mined, model=untrained)
    teacher = run.step("train_stage_1", TRAIN, stage_1.train, stream=stream, model=untrained)
    if recipe.stage_2 is not None:
        stage_2 = recipe.stage_2
        if recipe.mine_again:
            mined = run.step("mine_again", MINE, recipe.mine, prepare=prepared, model=teacher)
        stream = run.step("stream_stage_2", STREAM, stage_2.stream, prepare=prepared, mine=mined, model=teacher)
        teacher = run.step("train_stage_2", TRAIN, stage_2.train, stream=stream, model=teacher)
    run.step("baselines", BASELINES, recipe.baselines, prepare=prepared, model=untrained)
    scores = run.step("evaluate_teacher", EVALUATE, recipe.evaluate, prepare=prepared, model=teacher)
    run.register("register_teacher", recipe.register.teacher_name, model=teacher, scores=scores)

    # its student, as in distill.py
    student = recipe.student
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


PIPELINE = Pipeline(quickstart, recipe="quickstart.yaml", needs=("stage_1", "teacher_embeddings", "student"))

if __name__ == "__main__":
    raise SystemExit(main(PIPELINE))
