"""Recipes: what is refused, at which position, and that no problem hides another."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nvembed.plan.sizes import stage_sizes
from nvembed.preflight.needs import needed_packages
from nvembed.recipe.document import dotted, override, parse
from nvembed.recipe.schema import Recipe, RecipeError, load_recipe, resolved_yaml
from nvembed.types import UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "pipelines/recipes").glob("**/*.yaml"))
TINY = yaml.safe_load((ROOT / "pipelines/recipes/tiny.yaml").read_text())


def problems(path: Path | str, *settings: str, needs: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with a recipe, a line each, without the file's name."""
    with pytest.raises(RecipeError) as refused:
        load_recipe(str(path), settings, needs)
    return [str(problem).replace(f"{path}:", "") for problem in refused.value.problems]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text((ROOT / "pipelines/recipes/tiny.yaml").read_text())
    return path


def replaced(path: Path, old: str, new: str) -> int:
    """Change one place of a recipe; its line number."""
    text = path.read_text()
    assert text.count(old) >= 1, old
    path.write_text(text.replace(old, new, 1))
    return text[: text.index(old)].count("\n") + 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_valid_and_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(path))
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe(str(tmp_path / "resolved.yaml")) == recipe
    assert stage_sizes(recipe), "a recipe trains something"


def test_all_problems_are_listed_at_once_with_their_lines(tiny: Path) -> None:
    lines = {
        "seed": replaced(tiny, "  seed: 17", "  sed: 17"),
        "type": replaced(tiny, "{type: hpo_retrieval,", "{type: hpo_retrival,"),
        "literal": replaced(tiny, "batching: homogeneous", "batching: homogenous"),
        "range": replaced(tiny, "temperature: 0.05", "temperature: -1"),
        "batch": replaced(tiny, "steps: 6\n    global_batch_size: 16", "steps: 6\n    global_batch_size: 15") + 1,
        "weights": replaced(tiny, "weights: {cwe: 1, hpo: 1, code: 1}, steps: 10", "weights: {cwd: 1}, steps: 10"),
    }
    messages = problems(tiny)
    for line, text in [
        (lines["seed"], "prepare.sed: unknown key. Did you mean 'seed'? Allowed here: "),
        (lines["type"], "prepare.sources.1.type: 'hpo_retrival': allowed: cwe, hpo_retrieval,"),
        (
            lines["literal"],
            "stage_1.stream.batching: 'homogenous': allowed: homogeneous, blended. Did you mean 'homogeneous'?",
        ),
        (lines["range"], "stage_1.train.objective.temperature: -1: must be greater than 0"),
        (lines["batch"], "stage_2.stream.global_batch_size: 15 examples cannot be divided over"),
        (lines["weights"], "stage_1.stream.weights.cwd: no data set of this name. Did you mean 'cwe'?"),
    ]:
        assert any(re.match(rf"{line}:\d+: {re.escape(text)}", one) for one in messages), (line, text, messages)
    assert len(messages) == 6


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "stage_1.stream.global_batch_size=15",
            "stage_1.stream.global_batch_size: 15 examples .* nearest that can: 14 or 16",
        ),
        ("stage_1.train.optimizer={}", "stage_1.train.optimizer: unknown key. Did you mean 'optimiser'"),
        ("evaluate.dims=[32, 65]", "evaluate.dims.1: 65: a Matryoshka prefix is from 1 to 64, the backbone's width"),
        ("stage_2.train.objective.matryoshka_dims=[8, 8]", "matryoshka_dims.1: 8: listed twice"),
        (
            "student.init.num_layers=2",
            "student.init.num_layers: 2: a student has fewer layers than its teacher, which has 2",
        ),
        (
            "stage_1.train.objective={type: distill}",
            "objective.type: 'distill': stage_1 takes the objective 'contrastive'",
        ),
        ("student.train.objective={type: contrastive}", "student takes the objective 'distill'"),
        ("prepare.sources.1.name=cwe", "prepare.sources.1.name: 'cwe' names two data sets"),
        ("prepare.sources.1.name=a/b", "'a/b' cannot name a folder"),
        ("prepare.sources=[]", "prepare.sources: empty"),
        (
            "prepare.sources.0.instruction=cve",
            "prepare.sources.0.instruction: 'cve' is no key of the catalogue .* 'cwe'",
        ),
        ("stage_1.stream.weights.hpo=0", "stage_1.stream.weights.hpo: 0.0: must be a number above 0"),
        ("stage_1.train.optimiser.warmup_steps=11", "warmup_steps: 11 is more than stage_1.stream.steps = 10"),
        ("stage_2.stream.num_negatives=0", "0 negatives with stage_2.train.objective.in_batch false"),
        (
            "stage_2.train.objective.in_batch=true",
            "in_batch: true with hpo_classes, whose positives are texts of the query.s",
        ),
        ("stage_1.train.objective.temperature=.inf", r"temperature: inf: must be a finite number"),
        ("stage_1.train.optimiser.learning_rate=.inf", r"learning_rate: inf: must be a finite number"),
        ("stage_1.train.optimiser.clip_norm=.nan", r"clip_norm: nan: must be a finite number"),
        ("stage_1.train.optimiser.betas=[5, -3]", r"betas\.0: 5.*less than 1"),
        ("stage_1.stream.steps=1" + 400 * "0", "steps: a number of 401 digits: must be at most"),
        ("stage_1.stream.weights.cwe=.inf", r"weights\.cwe: inf: must be a finite number"),
        ("stage_1.stream.caps={cwe: -3}", r"caps\.cwe: -3: must be greater than or equal to 1"),
        ("stage_1.train.seed=-1", r"stage_1\.train\.seed: -1: must be greater than or equal to 0"),
        ("register.gate.floors={cwe: .nan}", r"floors\.cwe: nan: must be a finite number"),
        ("register.gate.floors={cwe: 7}", r"floors\.cwe: 7.*less than or equal to 1"),
        ("name=" + 5000 * "a", "name: a text of 5000 letters"),
        ("name=" + 500 * "a", "name: .* at most 100 characters"),
        ("stage_2.stream.num_negatives=3", "3: mine.num_negatives keeps only 2"),
        ("mine.depth=1", "mine.num_negatives: 2: only mine.depth = 1"),
        ("initialise.backbone.num_heads=5", "initialise.backbone.num_heads: 5 does not divide hidden_size = 64"),
        ("initialise.backbone.num_key_value_heads=3", "num_key_value_heads: 3 does not divide num_heads = 4"),
        ("initialise.embedder.pooling.num_heads=7", "pooling.num_heads: 7 does not divide the width 64"),
        ("register.student_name=nvembed-tiny-teacher", "is the teacher's name too"),
        ("register.gate.floors={cew: 0.1}", "register.gate.floors.cew: no data set of this name. .*'cwe'"),
        ("register.gate.margn=0.1", "register.gate.margn: .*'?margin'?"),
        ("stage_1=null", "stage_1: missing; stage_2 goes on from it"),
        ("initialise=null", "initialise: missing; stage_1 trains the model"),
        ("name=a b", "name: 'a b': string should match pattern"),
        ("stage_1.train=7", "stage_1.train: 7: must be a section"),
        (
            "stage_1.train.engine={type: torch, zero_stage: 3}",
            "engine.zero_stage: unknown key.*Allowed here: gradient_ch",
        ),
        (
            "stage_1.train.engine={type: torch, gradient_checkpoints: true}",
            "engine.gradient_checkpoints: unknown key. .*'gradient_checkpointing'",
        ),
        ("stage_1.train.engine={zero_stage: 2}", "engine.type: missing; allowed: deepspeed, torch"),
        ("prepare.sources.9.name=x", "prepare.sources is a list; write a number from 0 to 4"),
        ("stage_1.train.seed.deeper=1", "stage_1.train.seed is 17, not a section"),
        ("stage_1.train.seed=[", "the value is not valid YAML"),
        ("seed", "write --set section.key=value"),
        ("a..b=1", "write --set section.key=value"),
    ],
)
def test_a_setting_is_refused_and_named(tiny: Path, setting: str, message: str) -> None:
    listed = problems(tiny, setting)
    assert any(re.search(message, problem) for problem in listed), listed


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stage_2=null", "mine_again: true: only stage_2 learns from what is mined again"),
        ("mine.rule={type: random}", "mine_again: true: mine.rule draws at random"),
    ],
)
def test_mining_again_needs_a_stage_2_and_a_search(tiny: Path, setting: str, message: str) -> None:
    assert load_recipe(str(tiny), ["mine_again=true"]).mine_again
    assert any(message in problem for problem in problems(tiny, "mine_again=true", setting))


def test_a_wrong_setting_is_reported_with_the_setting_as_its_position(tiny: Path) -> None:
    assert problems(tiny, "mine.depth=x", "prepare.seed=17") == [
        "--set mine.depth=x: mine.depth: 'x': must be a valid integer, unable to parse string as an integer"
    ]


def test_settings_reach_sections_lists_and_what_was_not_written(tiny: Path) -> None:
    settings = ["stage_1.train.seed=99", "prepare.sources.0.max_test=7", "tracking.enabled=false", "stage_2=null"]
    settings += ["mine.rule={type: random}", "stage_1.stream.weights={cwe: 2}", "description='a=b'"]
    recipe = load_recipe(str(tiny), settings)
    assert recipe.stage_1.train.seed == 99 and recipe.prepare.sources[0].max_test == 7
    assert recipe.tracking.enabled is False and recipe.stage_2 is None and recipe.mine.rule.type == "random"
    assert recipe.stage_1.stream.weights == {"cwe": 2.0} and recipe.description == "a=b"


def test_the_last_setting_counts(tiny: Path) -> None:
    assert load_recipe(str(tiny), ["stage_1.train.seed=1", "stage_1.train.seed=2"]).stage_1.train.seed == 2


def test_a_pipeline_needs_its_sections(tiny: Path) -> None:
    messages = problems(tiny, "teacher_embeddings=null", needs=("teacher_embeddings", "teacher"))
    assert [line.split(": ", 1)[1] for line in messages] == [
        "teacher: missing; this pipeline needs the section",
        "teacher_embeddings: missing; this pipeline needs the section",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nname: y\n", r"2:1: name: written twice \(first on line 1\)"),
        ("mine:\n  depth: 3\n  depth: 4\n", r"3:3: mine.depth: written twice \(first on line 2\)"),
        ("name: [1\n", r"2:1: not valid YAML"),
        ("", "1:1: the recipe is empty"),
        ("- a\n", "1:1: a recipe is a mapping of sections"),
        ("name: &a [*a]\n", "refers to a value it is part of"),
        ("name: \x00\n", "not valid YAML"),
        ("when: 2026-99-99\n", "not valid YAML"),
        ("name: !!python/object/apply:os.system [ls]\n", "1:7: name: a YAML tag"),
    ],
)
def test_broken_yaml_is_reported_by_position(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert any(re.search(message, line) for line in problems(path)), problems(path)


def test_files_that_are_no_recipe(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"no such recipe\. Did you mean .*tiny\.yaml\?"):
        load_recipe(str(tiny.parent / "tinny.yaml"))
    with pytest.raises(UserError, match="cannot be read as a recipe"):
        load_recipe(str(tiny.parent))
    (tiny.parent / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not a text file in UTF-8"):
        load_recipe(str(tiny.parent / "binary.yaml"))


PATHS: list[tuple[Any, ...]] = []


def leaves(value: Any, path: tuple[Any, ...] = ()) -> None:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        PATHS.append((*path, key))
        leaves(item, (*path, key))


leaves(TINY)


@given(st.sampled_from(PATHS), st.sampled_from(["q", "xx", "9z"]))
def test_a_mistyped_key_is_reported_at_its_line_at_any_depth(path: tuple[Any, ...], letters: str) -> None:
    """Each key of the tiny recipe in turn, written with letters too many."""
    if isinstance(path[-1], int):
        return
    data = copy.deepcopy(TINY)
    section: Any = data
    for part in path[:-1]:
        section = section[part]
    wrong = f"{path[-1]}{letters}"
    renamed = {wrong if key == path[-1] else key: value for key, value in section.items()}
    section.clear()
    section.update(renamed)
    text = yaml.safe_dump(data, sort_keys=False)
    document, bad = parse(text, "r.yaml")
    assert not bad
    from nvembed.recipe.checks import cross_checks
    from nvembed.recipe.validation import validate

    sections, wrongs = validate(Recipe, document)
    wrongs += cross_checks(sections, document)
    here = [problem for problem in wrongs if problem.path[: len(path)] == (*path[:-1], wrong)]
    if path[-1] != "type":  # without its type a section's other keys cannot be checked
        assert here, wrongs
        line = text.splitlines()[here[0].position.line - 1]
        assert wrong in line


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4), st.integers())
def test_an_override_writes_exactly_one_value(path: list[str], value: int) -> None:
    document, _ = parse("a: {b: {c: 1}}\nb: 2\nz: 3\n", "r.yaml")
    before = copy.deepcopy(document.data)
    wrong = override(document, [f"{dotted(tuple(path))}={value}"])
    if wrong:
        assert document.data == before and "not a section" in wrong[0].message
        return
    assert document.get(tuple(path)) == value
    assert str(document.position(tuple(path))) == f"--set {dotted(tuple(path))}={value}"
    assert document.data["z"] == 3


def test_caps_and_allowed_leaks_name_data_sets(tiny: Path) -> None:
    source = "{type: beir, name: benchmark, instruction: web_search, uri: nowhere}"
    messages = problems(
        tiny, "stage_1.stream.caps={cwee: 5}", f"prepare.decontaminate={{against: [{source}], allow: [hpoo]}}"
    )
    assert any(
        "stage_1.stream.caps.cwee: not among stage_1.stream.weights. Did you mean 'cwe'?" in one for one in messages
    )
    assert any(
        "prepare.decontaminate.allow.0: no data set of this name. Did you mean 'hpo'?" in one for one in messages
    )
    assert len(messages) == 2


def test_evaluation_sets_are_checked_before_the_run(tiny: Path) -> None:
    source = "{type: cwe, name: benchmark, instruction: cwe}"
    recipe = load_recipe(str(tiny), [f"prepare.decontaminate={{against: [{source}]}}", "prepare.sources.0.type=cwe"])
    assert "prepare.decontaminate.against.0" in needed_packages(recipe)["cwe2"]
