"""The report of a hand-made road: the shape others rely on, honest comparisons, a page that is well-formed and safe."""

import json
import logging
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from nvembed import storage
from nvembed.report.comparisons import MEAN
from nvembed.report.schema import Report
from nvembed.report.write import read_report, write_report

RECIPE = {"name": "quickstart", "evaluate": {"bootstrap_samples": 200, "seed": 17}}
CONTRACT = ["schema_version", "recipe", "steps", "baselines", "scores", "models", "wall_seconds", "peak_pss_mb"]
VOID = {"meta", "line", "circle", "rect", "polyline"}


class Page(HTMLParser):
    """Checks nesting and collects what a test asks about."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A whole road's report."""
    out = tmp_path_factory.mktemp("report")
    return write(out, request.getfixturevalue("make_road"))


def write(out: Path, make_road: Callable[..., Any], **options: Any) -> Path:
    road = make_road(str(out), **options)
    uri = write_report(str(out), "quickstart", RECIPE, road.records, road.artifacts, 1043.2, 5230.0)
    assert uri == str(out / "report.html")
    return out


def raw(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


# -- report.json ----------------------------------------------------------------------------------------------------


def test_contract_keys(written: Path) -> None:
    report = raw(written)
    assert list(report)[: len(CONTRACT)] == CONTRACT
    assert report["schema_version"] == 1 and report["recipe"] == "quickstart"
    assert set(report["steps"][0]) == {"name", "status", "seconds", "peak_pss_mb", "artifact"}
    assert set(report["baselines"]) == {"bm25", "minilm", "untrained"}
    assert set(report["scores"]) == {"teacher", "student", "student@288"}
    assert set(report["other_scores"]) == {"teacher@288", "student_before", "student_before@288"}
    assert set(report["models"]) == {"teacher", "student"}
    for role, step in (("teacher", "train_stage_2"), ("student", "train_student")):
        model = report["models"][role]
        assert Path(model["folder"]) == written / step / "model" and Path(model["folder"]).is_absolute()
        assert model["registry_uri"] == f"models:/nvembed-{role}/1"
    assert (report["wall_seconds"], report["peak_pss_mb"]) == (1043.2, 5230.0)


def test_primary_metric_stands_first_however_the_files_sort(written: Path) -> None:
    stored = storage.read_json(str(written / "evaluate_teacher" / "scores.json"))["scores"]["model"]
    assert next(iter(stored["cwe"])) != "ndcg_at_10"
    teacher = raw(written)["scores"]["teacher"]
    assert {name: next(iter(metrics)) for name, metrics in teacher.items()} == {
        "cwe": "ndcg_at_10",
        "hpo": "ndcg_at_10",
        "code": "ndcg_at_10",
        "hpo_classes": "accuracy",
        "hpo_similarity": "spearman",
    }
    assert teacher["cwe"]["ndcg_at_10"] == stored["cwe"]["ndcg_at_10"]


def test_schema_reads_back_and_refuses_what_it_does_not_know(written: Path) -> None:
    report = read_report(str(written / "report.json"))
    assert report.training["train_stage_1"].steps == 100
    assert (
        report.lineage["train_stage_1"].inputs["stream"].manifest_hash == report.lineage["stream_stage_1"].manifest_hash
    )
    assert report.datasets["hpo_similarity"].synthetic
    assert report.environment.packages["nvembed"]
    with pytest.raises(ValidationError):
        Report.model_validate({**raw(written), "another": 1})


def test_texts_stay_out(written: Path) -> None:
    assert "private" in (written / "mine" / "audit.json").read_text()
    for name in ("report.json", "report.html"):
        assert "private" not in (written / name).read_text()


def test_comparisons_are_paired(written: Path) -> None:
    """The interval of a difference is far narrower than the two intervals would allow: the items are the same."""
    found = {(d["a"], d["b"], d["over"]): d for d in raw(written)["comparisons"]}
    for b in ("untrained", "bm25", "minilm"):
        assert ("teacher", b, MEAN) in found
    assert ("teacher", "bm25", "hpo_classes") not in found
    assert {("student", "student_before", MEAN), ("student@288", "student_before@288", MEAN)} <= set(found)
    against = found["teacher", "untrained", "cwe"]
    table = raw(written)
    teacher, untrained = (
        table[part][name]["cwe"]["ndcg_at_10"]["value"]
        for part, name in (("scores", "teacher"), ("baselines", "untrained"))
    )
    assert against["value"] == pytest.approx(teacher - untrained)
    assert against["low"] < against["value"] < against["high"] and against["high"] - against["low"] < 0.06
    assert against["clear"] and not found["teacher", "minilm", "hpo_similarity"]["clear"]
    mean = np.mean([found["teacher", "untrained", name]["value"] for name in ("cwe", "hpo", "code")])
    assert found["teacher", "untrained", MEAN]["value"] == pytest.approx(mean)


def test_shares_of_the_teacher(written: Path) -> None:
    report = raw(written)

    def mean(system: str) -> float:
        return float(
            np.mean([report["scores"][system][name]["ndcg_at_10"]["value"] for name in ("cwe", "hpo", "code")])
        )

    shares = {share["system"]: share for share in report["shares"]}
    assert shares["student"]["of_teacher"] == pytest.approx(mean("student") / mean("teacher"))
    assert shares["student"]["of_student"] == 1.0
    assert shares["student@288"]["of_student"] == pytest.approx(mean("student@288") / mean("student"))


def test_a_road_without_student(tmp_path: Path, make_road: Callable[..., Any]) -> None:
    report = raw(write(tmp_path, make_road, student=False))
    assert set(report["scores"]) == {"teacher"} and set(report["models"]) == {"teacher"}
    assert report["student"] is None and report["shares"] == []
    page = Page((tmp_path / "report.html").read_text())
    assert "Student against teacher" not in page.text and "train_student" not in page.text


def test_a_road_that_only_prepared(tmp_path: Path, make_road: Callable[..., Any]) -> None:
    road = make_road(str(tmp_path), student=False)
    prepared = {"prepare": road.artifacts["prepare"]}
    write_report(str(tmp_path), "tiny", {}, road.records[:1], prepared, 3.0, None)
    report = raw(tmp_path)
    assert report["baselines"] == report["scores"] == report["models"] == {} and report["peak_pss_mb"] is None
    assert "Data sets" in Page((tmp_path / "report.html").read_text()).text


def test_a_score_that_is_no_number_is_left_out_and_said(
    tmp_path: Path, make_road: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    road = make_road(str(tmp_path), student=False)
    uri = road.artifacts["evaluate_teacher"].path("scores.json")
    scores = storage.read_json(uri)
    scores["scores"]["model"]["hpo_classes"]["v_measure"] = {"value": float("nan"), "low": 0.0, "high": 1.0}
    storage.write_json(uri, scores)
    with caplog.at_level(logging.WARNING):
        write_report(str(tmp_path), "tiny", RECIPE, road.records, road.artifacts, 3.0, None)
    assert list(raw(tmp_path)["scores"]["teacher"]["hpo_classes"]) == ["accuracy"]
    assert "v_measure is left out" in caplog.text


# -- report.html ----------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_self_contained(written: Path) -> None:
    html = (written / "report.html").read_text()
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|src=|href=", html)
    assert {"script", "link", "img", "iframe"}.isdisjoint(name for name, _ in page.tags)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert html.index('charset="utf-8"') < 1024


def test_page_is_accessible(written: Path) -> None:
    page = Page((written / "report.html").read_text())
    assert ("html", {"lang": "en"}) in page.tags
    drawings = [attributes for name, attributes in page.tags if name == "svg"]
    assert len(drawings) == 5 + 3 + 3  # data sets, loss curves, mining
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawings)
    assert page.count("desc") == len(drawings)
    heads = [attributes for name, attributes in page.tags if name == "th"]
    assert heads and all(attributes["scope"] in ("col", "row") for attributes in heads)
    assert page.count("caption") == page.count("table")


def test_page_says_what_matters(written: Path) -> None:
    text = Page((written / "report.html").read_text()).text
    report = raw(written)
    assert f"{report['scores']['teacher']['cwe']['ndcg_at_10']['value']:.3f}" in text
    for said in (
        "best: 0.",
        "untrained backbone",
        "The labels of this set are synthetic.",
        "by CVE id: all descriptions of a CVE are on one side",
        "optimiser step",
        "train_stage_2: loss",
        "models:/nvembed-student/1: candidate, champion",
        report["lineage"]["mine"]["manifest_hash"][:12],
        "17 min 23 s, 5.11 GiB at most",
        "known positive",
        "exact search in the whole corpus",
        "hpo: last_causal",
        "after training: the projection learned in training",
        "49,545,216",
    ):
        assert said in text, said


def test_everything_is_escaped(tmp_path: Path, make_road: Callable[..., Any]) -> None:
    bad = "<script>alert(1)</script>\"&'"
    out = write(tmp_path, make_road, rename={"cwe": bad})
    html = (out / "report.html").read_text()
    page = Page(html)
    assert page.count("script") == 0 and "<script" not in html
    assert bad in page.text
    assert any(attributes.get("aria-label", "").startswith(bad) for _, attributes in page.tags)
