"""The whole mission on one laptop: a teacher and its student, real text, a real small LLM, about a quarter of an hour.

    python pipelines/quickstart.py [RECIPE] [--set a.b=c] [--out URI] [--dry-run]

`pipelines/recipes/tiny.yaml` walks the same road with a random 2-layer LLM in a few minutes.
"""

import nvembed.pipeline.early  # isort: skip  # noqa: F401  (first: Ctrl-C while the rest loads ends quietly)

from distill import train_student
from nv_embed import train_teacher

from nvembed.pipeline.command_line import tell
from nvembed.pipeline.run import Road


def quickstart(road: Road) -> None:
    """Both stories, one after the other, and the report."""
    prepared, teacher = train_teacher(road)
    train_student(road, prepared, teacher)
    road.report()


if __name__ == "__main__":
    raise SystemExit(tell(quickstart, default="quickstart.yaml", needs=("stage_1", "teacher_embeddings", "student")))
