"""Mined against random negatives: the one measurement behind the README's line.

    python tests/benchmarks/mined_against_random.py QUICKSTART_OUT RANDOM_OUT

QUICKSTART_OUT is a finished quickstart. RANDOM_OUT trains the same teacher on the same data from the same start, but
with random negatives. Prints, per data set and for the mean of the retrieval sets, the paired-bootstrap 95 % interval
of mined - random on the same held-out items.
"""

import sys

from nvembed.data.stream import STREAM
from nvembed.evaluation.run import EVALUATE
from nvembed.evaluation.significance import compare
from nvembed.mining.config import RandomNegatives
from nvembed.mining.run import MINE
from nvembed.recipe import load_recipe
from nvembed.retrieval.cluster import ensure_ray
from nvembed.storage import load_artifact
from nvembed.training.launch import TRAIN


def main(mined: str, random: str) -> None:
    """Train the random arm and print the comparison."""
    recipe = load_recipe(f"{mined}/recipe.yaml")
    ensure_ray()
    prepared, model = load_artifact(f"{mined}/prepare"), load_artifact(f"{mined}/initialise")
    negatives = recipe.mine.model_copy(update={"rule": RandomNegatives()})
    drawn = MINE.run(negatives, {"prepare": prepared}, f"{random}/mine")
    for name, stage in (("stage_1", recipe.stage_1), ("stage_2", recipe.stage_2)):
        inputs = {"prepare": prepared, "mine": drawn, "model": model}
        stream = STREAM.run(stage.stream, inputs, f"{random}/stream_{name}")
        model = TRAIN.run(stage.train, {"stream": stream, "model": model}, f"{random}/train_{name}")
    scores = EVALUATE.run(recipe.evaluate, {"prepare": prepared, "model": model}, f"{random}/evaluate_teacher")
    for row in compare(load_artifact(f"{mined}/evaluate_teacher"), scores, "mined - random"):
        value, low, high = (row["delta"][key] for key in ("value", "low", "high"))
        print(f"{row['dataset']:>24} {row['metric']:>12}  {value:+.4f} [{low:+.4f}, {high:+.4f}]")


if __name__ == "__main__":
    main(*sys.argv[1:3])
