"""What mining buys: random, naive top-k and positive-aware negatives train the same model, several seeds each.

    python tests/benchmarks/what_mining_buys.py arms OUT [--recipe pipelines/recipes/quickstart.yaml] [--seeds 17 ...]
    python tests/benchmarks/what_mining_buys.py train OUT [--device cuda] [--only RULE:SEED ...]
    python tests/benchmarks/what_mining_buys.py table OUT

`arms` prepares the data, draws an untrained model per seed and mines once per rule; the corpus is searched once, as
naive negatives are selected again from the positive-aware search. `train` lays out the streams of every arm (a rule
and a seed), trains both stages with the plain torch engine in this process and scores the held-out items; it needs
neither Ray nor DeepSpeed, so it may run on another machine to which OUT was copied. `table` prints Markdown. Every
piece is a pipeline step: what is finished is kept, and the same command goes on.

Between rules only the negatives of the retrieval and sts sets differ: at one seed all rules start from the same
weights and see the same examples in the same order. Between seeds everything drawn for a training differs: the head's
first weights, the order of the examples, which of an example's positives and mined negatives a step takes. Data,
held-out items and mined lists are the same for all. The backbone starts from its pretrained weights.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nvembed.core import storage
from nvembed.core.steps import METRICS, Step, StepResult, load_artifact
from nvembed.evaluation.config import EvaluateConfig
from nvembed.evaluation.run import load_sets, notes, settings_of, write_scores
from nvembed.evaluation.significance import (
    MEAN,
    PRIMARY_METRICS,
    RETRIEVAL_METRIC,
    PairedItems,
    paired_bootstrap_runs,
    paired_items,
)
from nvembed.evaluation.tasks import HeldOut, Vectors
from nvembed.mining.config import RandomNegatives, TopK
from nvembed.recipe.schema import Recipe, load_recipe, resolved_yaml
from nvembed.retrieval.encode_list import encode_texts
from nvembed.retrieval.encoders import Encoder, open_encoder
from nvembed.stream.reader import StreamReader
from nvembed.stream.steps import STREAM
from nvembed.training.build import TrainingSpec
from nvembed.training.config import TorchEngineConfig, TrainConfig
from nvembed.training.loop import train
from nvembed.training.worker import PlainContext
from nvembed.types import Artifact, UserError

logger = logging.getLogger("what_mining_buys")

RULES = ("random", "naive", "positive_aware")
CONTRASTS = (("positive_aware", "random"), ("naive", "random"), ("positive_aware", "naive"))
SAMPLES = 10_000
CPU = torch.device("cpu")


# -- arms -------------------------------------------------------------------------------------------------------------


def make_arms(recipe_uri: str, out: str, seeds: Sequence[int]) -> None:
    """Prepare and mine (with Ray), and draw the untrained models."""
    from nvembed.data.prepare import PREPARE
    from nvembed.mining.step import MINE
    from nvembed.training.initialise import INITIALISE

    recipe = load_recipe(recipe_uri, needs=("initialise", "stage_1", "stage_2"))
    prepared = PREPARE.run(recipe.prepare, {}, f"{out}/prepare")
    storage.write_bytes(f"{out}/recipe.yaml", resolved_yaml(recipe).encode())
    for seed in seeds:
        INITIALISE.run(
            recipe.initialise.model_copy(update={"seed": seed}), {"prepare": prepared}, f"{out}/start_{seed}"
        )
    aware = MINE.run(recipe.mine, {"prepare": prepared}, f"{out}/mine_positive_aware")
    naive = recipe.mine.model_copy(update={"rule": TopK(), "reuse": aware.uri})
    MINE.run(naive, {"prepare": prepared}, f"{out}/mine_naive")
    MINE.run(recipe.mine.model_copy(update={"rule": RandomNegatives()}), {"prepare": prepared}, f"{out}/mine_random")
    logger.info("arms: %d rules x seeds %s in %s", len(RULES), ", ".join(map(str, seeds)), out)


# -- train ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A rule and a seed, and where they are worked on."""

    out: str
    rule: str
    seed: int
    steps: int | None = None

    @property
    def uri(self) -> str:
        """A trial of few steps lies beside the real thing."""
        trial = "" if self.steps is None else f"try_{self.steps}_"
        return f"{self.out}/{trial}{self.rule}_{self.seed}"


def arms_of(out: str, only: Sequence[tuple[str, int]] | None = None, steps: int | None = None) -> list[Arm]:
    """The arms that `arms` has made ready, seed by seed.

    Raises:
        UserError: none, or not those of `only`.
    """
    starts = [int(name.removeprefix("start_")) for name in storage.list_directory(out) if name.startswith("start_")]
    known = [(rule, seed) for seed in sorted(starts) for rule in RULES]
    missing = sorted(set(only or ()) - set(known))
    if missing or not known:
        raise UserError(f"{out} has no arms {missing or ''}; it has {known}. Run `arms` first.")
    return [Arm(out, rule, seed, steps) for rule, seed in known if only is None or (rule, seed) in only]


@dataclass
class Here(PlainContext):
    """One process on a device of the user's choice."""

    where: torch.device = CPU

    def device(self) -> torch.device:
        return self.where


def train_arm(arm: Arm, recipe: Recipe, device: torch.device, precision: str) -> None:
    """Streams, stage 1, stage 2 and scores of one arm."""
    prepared, mined = (load_artifact(f"{arm.out}/{name}") for name in ("prepare", f"mine_{arm.rule}"))
    model = load_artifact(f"{arm.out}/start_{arm.seed}")
    assert recipe.stage_2 is not None
    shift = arm.seed - recipe.stage_1.stream.seed  # the first seed of the recipe is the recipe's own run
    for name, stage in (("stage_1", recipe.stage_1), ("stage_2", recipe.stage_2)):
        seed, steps = stage.stream.seed + shift, arm.steps or stage.stream.steps
        ordered = stage.stream.model_copy(update={"seed": seed, "steps": steps})
        inputs = {"prepare": prepared, "mine": mined, "model": model}
        stream = STREAM.run(ordered, inputs, f"{arm.uri}/stream_{name}")
        alone = {"engine": TorchEngineConfig(), "num_workers": 1, "precision": precision, "seed": seed}
        inputs = {"stream": stream, "model": model}
        step = Step("train", 1, functools.partial(_train, device), cleared=False)
        model = step.run(stage.train.model_copy(update=alone), inputs, f"{arm.uri}/train_{name}")
    encode = recipe.evaluate.encode.model_copy(update={"precision": precision})
    config = recipe.evaluate.model_copy(update={"dims": (), "encode": encode})
    step = Step("evaluate", 1, functools.partial(_evaluate, device), cleared=False)
    scores = step.run(config, {"prepare": prepared, "model": model}, f"{arm.uri}/evaluate")
    logger.info("%s, seed %d: %s", arm.rule, arm.seed, scores.manifest["metrics"]["scores"]["model"])


def _train(device: torch.device, config: TrainConfig, inputs: Mapping[str, Artifact], work_uri: str) -> StepResult:
    """As the `train` step, without Ray."""
    stream = StreamReader(inputs["stream"].uri)
    hashes = {name: artifact.manifest_hash for name, artifact in sorted(inputs.items())}
    try:
        spec = TrainingSpec(config, inputs["stream"].uri, inputs["model"].path("model"), work_uri, hashes)
        train(spec, stream, Here(where=device))
    finally:
        stream.close()
    rows = [json.loads(line) for line in storage.read_bytes(storage.join(work_uri, METRICS)).splitlines()]
    facts = {"first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"], **_where(device)}
    return StepResult(rows={"steps": len(rows)}, metrics=facts)


def _evaluate(
    device: torch.device, config: EvaluateConfig, inputs: Mapping[str, Artifact], work_uri: str
) -> StepResult:
    """As the `evaluate` step, without an actor pool."""
    sets = load_sets(inputs["prepare"], config.split)
    encode, folder = config.encode, inputs["model"].path("model")
    encoder = open_encoder(folder, None, encode.precision, token_budget=encode.token_budget, device=str(device))
    scored = {each.dataset: each.score(_vectors(each, encoder), settings_of(config)) for each in sets}
    extra = {"split": config.split, "notes": notes(config, sets)}
    result = write_scores(work_uri, {"model": scored}, inputs["prepare"], extra)
    result.metrics.update(_where(device))
    return result


def _vectors(held_out: HeldOut, encoder: Encoder) -> Vectors:
    def encoded(role: str) -> Iterator[tuple[list[str], np.ndarray]]:
        keys, texts, instructions = zip(*held_out.roles()[role](), strict=True)
        yield list(keys), encode_texts(texts, encoder, prompt=instructions)

    return encoded


def _where(device: torch.device) -> dict[str, Any]:
    """What computed; digits depend on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return {"device": name, "torch": f"torch {torch.__version__}", "tf32": f"TF32 {'on' if tf32 else 'off'}"}


def train_arms(arms: Sequence[Arm], device: str, precision: str) -> None:
    """Train and score arms, one after another."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for arm in arms:
        started = time.monotonic()
        train_arm(arm, load_recipe(f"{arm.out}/recipe.yaml"), torch.device(device), precision)
        logger.info("%s, seed %d: %.0f s", arm.rule, arm.seed, time.monotonic() - started)


# -- table ------------------------------------------------------------------------------------------------------------


Scores = Mapping[tuple[str, int], Artifact]  # (rule, seed) -> evaluation


def print_table(out: str) -> None:
    """Markdown: levels, paired differences, every arm. Only seeds that all rules have finished count.

    Raises:
        UserError: no seed is finished.
    """
    found = {(arm.rule, arm.seed): f"{arm.uri}/evaluate" for arm in arms_of(out)}
    done = {key: uri for key, uri in found.items() if storage.exists(f"{uri}/manifest.json")}
    seeds = [seed for seed in sorted({seed for _, seed in found}) if all((rule, seed) in done for rule in RULES)]
    if not seeds:
        raise UserError(f"{out}: no seed is trained under all of {', '.join(RULES)}; run `train` first.")
    scores = {(rule, seed): load_artifact(done[rule, seed]) for rule in RULES for seed in seeds}
    made = (artifact.manifest for artifact in scores.values())
    facts = {(*(row["metrics"][name] for name in _where(CPU)), row["config"]["encode"]["precision"]) for row in made}
    print(f"Seeds {', '.join(map(str, seeds))}. Computed on {'; '.join(', '.join(fact) for fact in sorted(facts))}.")
    if len(found) > len(scores):
        print(f"Not all of it is trained: {len(found) - len(scores)} of {len(found)} arms are left out.")
    _print_levels(scores, seeds)
    _print_differences(scores, seeds)
    _print_arms(scores, seeds)


def _values(artifact: Artifact) -> dict[tuple[str, str], float]:
    """The primary metric of every data set, and the mean of the retrieval sets."""
    found: dict[tuple[str, str], float] = {}
    scores = storage.read_json(artifact.path("scores.json"))["scores"]["model"]  # in the recipe's order
    for dataset, metrics in scores.items():
        primary = (metric for metric in metrics if metric in PRIMARY_METRICS)
        found.update({(dataset, metric): metrics[metric]["value"] for metric in primary})
    retrieval = [value for (_, metric), value in found.items() if metric == RETRIEVAL_METRIC]
    return {**found, (MEAN, RETRIEVAL_METRIC): float(np.mean(retrieval))}


def _print_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print()
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


def _print_levels(scores: Scores, seeds: Sequence[int]) -> None:
    values = {key: _values(artifact) for key, artifact in scores.items()}
    rows = []
    for dataset, metric in values[RULES[0], seeds[0]]:
        row = [dataset, metric]
        for rule in RULES:
            found = [100 * values[rule, seed][dataset, metric] for seed in seeds]
            row.append(f"{np.mean(found):.1f} ({min(found):.1f}..{max(found):.1f})")
        rows.append(row)
    _print_rows(["data set", "metric", *(f"{rule}, mean (min..max) x 100" for rule in RULES)], rows)


def _print_differences(scores: Scores, seeds: Sequence[int]) -> None:
    columns = []
    for first, second in CONTRASTS:
        pairs = _pairs(scores, seeds, first, second)
        retrieval = [each for each in pairs.values() if each[0].metric == RETRIEVAL_METRIC]
        shown = {each[0].dataset: [each] for each in pairs.values()} | {MEAN: retrieval}
        columns.append({dataset: _difference(each) for dataset, each in shown.items()})
    head = [f"{first} - {second}" for first, second in CONTRASTS]
    rows = [[dataset, *(column[dataset] for column in columns)] for dataset in columns[0]]
    _print_rows(["points: value [95 %] (each seed)", *head], rows)


def _pairs(scores: Scores, seeds: Sequence[int], first: str, second: str) -> dict[str, list[PairedItems]]:
    """For each data set the pair of every seed."""
    found: dict[str, list[PairedItems]] = {}
    for seed in seeds:
        for pair in paired_items(scores[first, seed], scores[second, seed]):
            found.setdefault(pair.dataset, []).append(pair)
    return found


def _difference(datasets: Sequence[Sequence[PairedItems]]) -> str:
    found = paired_bootstrap_runs(datasets, SAMPLES)
    value, low, high = (100 * found[key] for key in ("value", "low", "high"))
    singles = []
    for run in zip(*datasets, strict=True):
        singles.append(100 * np.mean([pair.statistic()(np.arange(len(pair.a_N))[None])[0] for pair in run]))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}] ({', '.join(f'{single:+.1f}' for single in singles)})"


def _print_arms(scores: Scores, seeds: Sequence[int]) -> None:
    rows = []
    names = list(_values(scores[RULES[0], seeds[0]]))
    for (rule, seed), artifact in scores.items():
        rows.append([rule, str(seed), *(f"{100 * value:.2f}" for value in _values(artifact).values())])
    _print_rows(["rule", "seed", *(f"{dataset} {metric}" for dataset, metric in names)], rows)


def _only(text: str) -> tuple[str, int]:
    rule, _, seed = text.partition(":")
    if rule not in RULES or not seed.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not RULE:SEED with a rule of {', '.join(RULES)}")
    return rule, int(seed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    arms, trained, table = (commands.add_parser(name) for name in ("arms", "train", "table"))
    for command in (arms, trained, table):
        command.add_argument("out")
    arms.add_argument("--recipe", default="pipelines/recipes/quickstart.yaml")
    arms.add_argument("--seeds", type=int, nargs="+", default=[17, 27, 37], help="of what is drawn for a training")
    trained.add_argument("--device", default="cpu", help="cpu or cuda")
    trained.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of training and encoding")
    trained.add_argument("--only", type=_only, nargs="+", metavar="RULE:SEED")
    trained.add_argument("--steps", type=int, help="of each stage: a trial, kept apart")
    return parser.parse_args()


def main() -> None:
    """Run a command."""
    given = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    out = storage.absolute(given.out)
    try:
        if given.command == "arms":
            make_arms(given.recipe, out, given.seeds)
        elif given.command == "train":
            train_arms(arms_of(out, given.only, given.steps), given.device, given.precision)
        else:
            print_table(out)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
