"""The comparison of runs, and the report of a run written again: by the command, on hand-made outputs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_kit import RECIPE, Page, raw
from typer.testing import CliRunner

from nvembed.commands.app import app
from nvembed.core import storage
from nvembed.evaluation.significance import MEAN
from nvembed.pipeline.attempts import Records
from nvembed.report.compare import compare_runs
from nvembed.report.pages import write_report
from nvembed.report.runs import LABELS, collect_again, open_runs
from nvembed.types import UserError

SOURCES = [{"name": "cwe", "max_train": 5}, {"name": "hpo", "max_train": 5}]
BASE = {**RECIPE, "prepare": {"sources": SOURCES}}
CHANGED = {**BASE, "prepare": {"sources": [SOURCES[0], {"name": "hpo", "max_train": 9}]}, "name": "better"}


def output(out: Path, make_run: Callable[..., Any], recipe: dict[str, Any], **options: Any) -> Path:
    """A finished output as a run leaves it: steps, recipe, records, report."""
    run = make_run(str(out), **options)
    storage.write_bytes(str(out / "recipe.yaml"), yaml.safe_dump(recipe).encode())
    records = Records(str(out), 1, "quickstart")
    for entry in run.records:
        records.step(entry["name"], entry["status"], entry["seconds"], entry["peak_pss_mb"], entry["artifact"])
    records.close("done", 2000.0)
    write_report(str(out), recipe["name"], recipe, run.records, run.artifacts, 1043.2, 5230.0)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A run and a better one with other held-out examples in `code`."""
    folder, make_run = tmp_path_factory.mktemp("runs"), request.getfixturevalue("make_run")
    first = output(folder / "first", make_run, BASE)
    return first, output(folder / "better", make_run, CHANGED, skill={"teacher": 0.6, "student": 0.41}, other="code")


@pytest.fixture
def copy(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """The first run, moved, so that tests can change it."""
    return Path(shutil.copytree(runs[0], tmp_path / "copy"))


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_paired_differences_where_the_examples_are_the_same(runs: tuple[Path, Path]) -> None:
    comparison = compare_runs(open_runs([str(path) for path in runs]))
    pair = comparison.pairs[0]
    assert (pair.first, pair.later, pair.other_sets) == ("A", "B", ["code"])
    assert pair.recipe == ['name: "quickstart" -> "better"', "prepare.sources.hpo.max_train: 5 -> 9"]
    differences = {(row.a, row.over): row for row in pair.differences}
    assert {over for name, over in differences if name == "B teacher"} == {
        "cwe",
        "hpo",
        "hpo_classes",
        "hpo_similarity",
    }
    tables = [raw(path)["scores"]["teacher"]["cwe"]["ndcg_at_10"]["value"] for path in runs]
    row = differences["B teacher", "cwe"]
    assert row.b == "A teacher" and row.value == pytest.approx(tables[1] - tables[0]) and row.clear
    assert row.high - row.low < 0.06  # paired: far narrower than two separate intervals
    assert not differences["B student@288", "cwe"].clear and differences["B student@288", "cwe"].value == 0
    assert not [name for name in differences if "bm25" in name[0] or "before" in name[0]]
    assert pair.left_out == ["code: its held-out examples differ (evaluation hashes)"]


def test_the_mean_is_compared_when_all_sets_are_the_same(runs: tuple[Path, Path], copy: Path) -> None:
    comparison = compare_runs(open_runs([str(runs[0]), str(copy / "report.json")]))  # its artifacts are beside it
    means = [row for row in comparison.pairs[0].differences if row.over == MEAN]
    assert {row.a for row in means} == {"B teacher", "B student", "B teacher@288", "B student@288"}
    assert all(row.value == row.low == row.high == 0 for row in means)


def test_what_cannot_be_compared_is_listed(runs: tuple[Path, Path], copy: Path) -> None:
    (copy / "evaluate_teacher" / "items.parquet").unlink()
    alone = copy.parent / "report.json"
    shutil.copy(runs[1] / "report.json", alone)
    text = json.loads(alone.read_text())
    for step in text["steps"]:
        step["artifact"] = None
    text["scores"].pop("student@288")
    alone.write_text(json.dumps(text))
    comparison = compare_runs(open_runs([str(runs[0]), str(copy), str(alone)]))
    assert any(line.startswith("teacher: ") and "items.parquet" in line for line in comparison.pairs[0].left_out)
    assert "teacher: the per-item scores of run C no longer exist" in comparison.pairs[1].left_out
    assert "student@288: run C has no such model" in comparison.pairs[1].left_out


def test_the_page_of_two_runs(runs: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "both.html"
    done = invoke(*runs, "--out", target)
    assert done.exit_code == 0, done.output
    assert "not compared between A and B: code" in done.stdout and f"page: {target}" in done.stdout
    page = Page(target.read_text())
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    assert links and all(link and link.startswith("#") for link in links)
    assert page.count("script") == page.count("img") == page.count("link") == 0
    first, second = (raw(path)["scores"]["teacher"]["hpo"]["ndcg_at_10"]["value"] for path in runs)
    for text in (
        "A: quickstart",
        "prepare.sources.hpo.max_train: 5 -> 9",
        f"teacher {first:.3f}",
        f"{second:.3f}",
        "B teacher − A teacher",
        "≠ The held-out examples of the runs differ here",
        "train_stage_1: loss",
        "train_stage_2: gap",
        "whole run 17 min 23 s",
        "models:/nvembed-teacher/1",
    ):
        assert text in page.text, text
    curves = [
        name for name, attributes in page.tags if name == "polyline" and attributes.get("class") == "thick series1"
    ]
    assert len(curves) == 3 + 2  # the second run's losses and gaps
    assert invoke(*runs, "--out", target).exit_code == 0, "a page of ours is written again"


def test_the_page_of_two_runs_is_escaped(runs: tuple[Path, Path], tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\"&'"
    for path, name in zip(runs, "ab", strict=True):
        (tmp_path / name).mkdir()
        text = (path / "report.json").read_text()
        for word in ("quickstart", "hpo_classes", "student@288"):
            text = text.replace(json.dumps(word), json.dumps(bad))
        (tmp_path / name / "report.json").write_text(text)
    target = tmp_path / "both.html"
    assert invoke(tmp_path / "a", tmp_path / "b", "--out", target).exit_code == 0
    page = Page(target.read_text())
    assert page.count("script") == 0 and "<script" not in target.read_text()
    assert f"A: {bad}" in page.text and f"{bad}: k-NN accuracy" in page.text


def test_json_of_two_runs(runs: tuple[Path, Path], tmp_path: Path) -> None:
    done = invoke(*runs, "--out", tmp_path / "both.html", "--json")
    output = json.loads(done.stdout)
    assert output["page"] == str(tmp_path / "both.html")
    assert [entry["recipe"] for entry in output["comparison"]["runs"]] == ["quickstart", "better"]
    assert output["comparison"]["runs"][1]["scores"]["teacher"] == raw(runs[1])["scores"]["teacher"]


def test_a_run_is_reported_on_again_from_its_steps(copy: Path) -> None:
    before = raw(copy)
    shutil.rmtree(copy / "train_student")  # as if the run had not reached it
    done = invoke(copy, "--json")
    assert done.exit_code == 0, done.output
    after = raw(copy)
    assert json.loads(done.stdout) == {"page": str(copy / "report.html"), "report": after}
    assert after["environment"] == before["environment"] and after["scores"] == before["scores"]
    assert set(after["training"]) == {"train_stage_1", "train_stage_2"} and set(after["models"]) == {"teacher"}
    names = [step["name"] for step in after["steps"]]
    assert names[:3] == ["prepare", "initialise", "mine"] and names[-1] == "train_student"
    assert after["steps"][0]["artifact"] == str(copy / "prepare"), "the output was moved"
    assert "train_student: loss" not in Page((copy / "report.html").read_text()).text


def test_the_report_of_another_version_is_written_again(copy: Path) -> None:
    before = raw(copy)
    (copy / "report.json").write_text(json.dumps({"schema_version": 0, "environment": before["environment"]}))
    assert invoke(copy / "report.json").exit_code == 2
    assert invoke(copy).exit_code == 0
    after = raw(copy)
    assert after["environment"] == before["environment"] and after["scores"] == before["scores"]
    (copy / "report.json").write_text("{}")
    with pytest.raises(UserError, match=r"its report\.json were not written by this version .*'environment'"):
        collect_again(str(copy))


def test_a_report_json_alone_becomes_a_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copy(runs[0] / "report.json", tmp_path)
    assert invoke(tmp_path / "report.json").exit_code == 0
    page = Page((tmp_path / "report.html").read_text())
    assert "train_stage_1: loss" in page.text and not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (None, ["gone"], "there is no such run"),
        (None, ["."], "has no recipe.yaml"),
        (None, [".", "RUN"], "has no report.json"),
        (None, ["RUN", "RUN"], "given twice"),
        (None, ["RUN"] * 6, f"at most {len(LABELS)}"),
        ("report.json", ["report.json"], "not a report that this nvembed reads"),
        ("page.html", ["RUN", "--out", "page.html"], "no report page of nvembed"),
        (None, ["RUN", "BETTER", "--out", "."], "is a directory"),
    ],
)
def test_wrong_input_is_reported(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any,
    prepare: str | None, arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if prepare:
        (tmp_path / prepare).write_text('{"mine": true}')
    named = {"RUN": str(runs[0]), "BETTER": str(runs[1])}
    done = invoke(*(named.get(part, part) for part in arguments))
    assert done.exit_code == 2
    assert message in done.output + capfd.readouterr().err


def test_a_step_that_lost_a_file_is_reported(copy: Path) -> None:
    (copy / "evaluate_teacher" / "scores.json").unlink()
    with pytest.raises(UserError, match=r"lacks a file: .*scores\.json"):
        collect_again(str(copy))


def test_a_step_of_another_version_is_reported(copy: Path) -> None:
    manifest = copy / "prepare" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("near_duplicates_left", "near_copies_left"))
    with pytest.raises(
        UserError, match=r"not written by this version .*'near_duplicates_left'.* run its pipeline again"
    ):
        collect_again(str(copy))
