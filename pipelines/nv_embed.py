"""The teacher: prepare -> mine -> train stage 1 [-> mine again] -> train stage 2 -> evaluate -> register.

    python pipelines/nv_embed.py [RECIPE] [--set a.b=c] [--out URI] [--dry-run]

Every `run.step` is a directory below the output: skipped when it is published, resumed when it was killed.
"""

from nvembed.pipeline.command_line import main
from nvembed.pipeline.declaration import Pipeline
from nvembed.pipeline.run import PipelineRun
from nvembed.pipeline.steps import BASELINES, EVALUATE, INITIALISE, MINE, PREPARE, STREAM, TRAIN


def nv_embed(run: PipelineRun) -> None:
    """Train a teacher from raw text to a registered model."""
    recipe = run.recipe
    prepared = run.step("prepare", PREPARE, recipe.prepare)
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
    run.report()


PIPELINE = Pipeline(nv_embed, recipe="quickstart.yaml", needs=("stage_1",))

if __name__ == "__main__":
    raise SystemExit(main(PIPELINE))
