"""The teacher: prepare -> mine -> train stage 1 [-> mine again] -> train stage 2 -> evaluate -> register.

    python pipelines/nv_embed.py [RECIPE] [--set a.b=c] [--out URI] [--dry-run]

Every line is one pipeline step: a directory below the output, skipped when it is there, resumed when it was killed.
"""

import nvembed.pipeline.early  # isort: skip  # noqa: F401  (first: Ctrl-C while the rest loads ends quietly)

from nvembed.data.prepare import PREPARE
from nvembed.evaluation.baselines import BASELINES
from nvembed.evaluation.run import EVALUATE
from nvembed.mining.step import MINE
from nvembed.pipeline.command_line import tell
from nvembed.pipeline.run import Road
from nvembed.stream.steps import STREAM
from nvembed.training.initialise import INITIALISE
from nvembed.training.launch import TRAIN
from nvembed.types import Artifact


def train_teacher(road: Road) -> tuple[Artifact, Artifact]:
    """Walk the road to the trained teacher; returns the prepared data and the teacher (model folder at `model/`)."""
    recipe = road.recipe
    prepared = road.step("prepare", PREPARE, recipe.prepare)
    untrained = road.step("initialise", INITIALISE, recipe.initialise, prepare=prepared)
    mined = road.step("mine", MINE, recipe.mine, prepare=prepared)

    stage_1 = recipe.stage_1
    stream = road.step("stream_stage_1", STREAM, stage_1.stream, prepare=prepared, mine=mined, model=untrained)
    teacher = road.step("train_stage_1", TRAIN, stage_1.train, stream=stream, model=untrained)

    if recipe.stage_2 is not None:
        stage_2 = recipe.stage_2
        if recipe.mine_again:
            mined = road.step("mine_again", MINE, recipe.mine, prepare=prepared, model=teacher)
        stream = road.step("stream_stage_2", STREAM, stage_2.stream, prepare=prepared, mine=mined, model=teacher)
        teacher = road.step("train_stage_2", TRAIN, stage_2.train, stream=stream, model=teacher)

    road.step("baselines", BASELINES, recipe.baselines, prepare=prepared, model=untrained)
    scores = road.step("evaluate_teacher", EVALUATE, recipe.evaluate, prepare=prepared, model=teacher)
    road.register("register_teacher", recipe.register.teacher_name, model=teacher, scores=scores)
    return prepared, teacher


def nv_embed(road: Road) -> None:
    """The whole story of one teacher."""
    train_teacher(road)
    road.report()


if __name__ == "__main__":
    raise SystemExit(tell(nv_embed, default="nv_embed.yaml", needs=("stage_1",)))
