"""The report of a hand-made run: the contract of its keys, paired comparisons, a well-formed and escaped page."""

import html
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from report_kit import RECIPE, Page, raw, write_run

from nvembed.core import storage
from nvembed.evaluation.significance import MEAN
from nvembed.report.content import ancestors
from nvembed.report.pages import write_report
from nvembed.report.runs import read_report
from nvembed.report.schema import Report
from nvembed.report.training_data import negatives_quality, quantile, share_above
from nvembed.types import UserError

CONTRACT = ["schema_version", "recipe", "steps", "baselines", "scores", "models", "wall_seconds", "peak_pss_mb"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The report of a complete run."""
    out = tmp_path_factory.mktemp("report")
    return write_run(out, request.getfixturevalue("make_run"))


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


def test_primary_metric_comes_first_in_any_order_of_the_files(written: Path) -> None:
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


def test_texts_are_not_in_the_report(written: Path) -> None:
    assert "private" in (written / "mine" / "audit.json").read_text()
    for name in ("report.json", "report.html"):
        assert "private" not in (written / name).read_text()


def test_credentials_are_not_in_the_report(
    tmp_path: Path, make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "c4nary-of-the-environment")
    run, uri = make_run(str(tmp_path), student=False), "postgresql://me:c4nary@host:5432/db"
    recipe = {
        **RECIPE,
        "tracking": {"uri": uri},
        "prepare": {"sources": [{"name": "c4nary-of-the-environment", "path": uri}]},
    }
    write_report(str(tmp_path), "tiny", recipe, [], {"prepare": run.artifacts["prepare"]}, 3.0, None)
    assert raw(tmp_path)["resolved_recipe"]["tracking"]["uri"] == "postgresql://me:****@host:5432/db"
    assert raw(tmp_path)["resolved_recipe"]["evaluate"] == RECIPE["evaluate"]
    for name in ("report.json", "report.html"):
        assert "c4n" not in (tmp_path / name).read_text()


def test_comparisons_are_paired(written: Path) -> None:
    """The interval of a difference is far narrower than the two intervals would allow: the items are the same."""
    differences = {(d["a"], d["b"], d["over"]): d for d in raw(written)["comparisons"]}
    for b in ("untrained", "bm25", "minilm"):
        assert ("teacher", b, MEAN) in differences
    assert ("teacher", "bm25", "hpo_classes") not in differences
    assert {("student", "student_before", MEAN), ("student@288", "student_before@288", MEAN)} <= set(differences)
    against = differences["teacher", "untrained", "cwe"]
    table = raw(written)
    teacher, untrained = (
        table[part][name]["cwe"]["ndcg_at_10"]["value"]
        for part, name in (("scores", "teacher"), ("baselines", "untrained"))
    )
    assert against["value"] == pytest.approx(teacher - untrained)
    assert against["low"] < against["value"] < against["high"] and against["high"] - against["low"] < 0.06
    assert against["clear"] and not differences["teacher", "minilm", "hpo_similarity"]["clear"]
    mean = np.mean([differences["teacher", "untrained", name]["value"] for name in ("cwe", "hpo", "code")])
    assert differences["teacher", "untrained", MEAN]["value"] == pytest.approx(mean)


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


def test_a_run_without_student(tmp_path: Path, make_run: Callable[..., Any]) -> None:
    report = raw(write_run(tmp_path, make_run, student=False))
    assert set(report["scores"]) == {"teacher"} and set(report["models"]) == {"teacher"}
    assert report["student"] is None and report["shares"] == []
    page = Page((tmp_path / "report.html").read_text())
    assert "Student against teacher" not in page.text and "train_student" not in page.text


def test_a_run_that_only_prepared(tmp_path: Path, make_run: Callable[..., Any]) -> None:
    run = make_run(str(tmp_path), student=False)
    prepared = {"prepare": run.artifacts["prepare"]}
    write_report(str(tmp_path), "tiny", {}, run.records[:1], prepared, 3.0, None)
    report = raw(tmp_path)
    assert report["baselines"] == report["scores"] == report["models"] == {} and report["peak_pss_mb"] is None
    assert "Data sets" in Page((tmp_path / "report.html").read_text()).text


def test_a_score_that_is_no_number_is_left_out_with_a_warning(
    tmp_path: Path, make_run: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(str(tmp_path), student=False)
    uri = run.artifacts["evaluate_teacher"].path("scores.json")
    scores = storage.read_json(uri)
    scores["scores"]["model"]["hpo_classes"]["v_measure"] = {"value": float("nan"), "low": 0.0, "high": 1.0}
    storage.write_json(uri, scores)
    with caplog.at_level(logging.WARNING):
        write_report(str(tmp_path), "tiny", RECIPE, run.records, run.artifacts, 3.0, None)
    assert list(raw(tmp_path)["scores"]["teacher"]["hpo_classes"]) == ["accuracy"]
    assert "v_measure is left out" in caplog.text
    scores["scores"]["model"]["hpo_classes"] = {"accuracy": {"value": float("nan"), "low": 0.0, "high": 1.0}}
    storage.write_json(uri, scores)
    write_report(str(tmp_path), "tiny", RECIPE, run.records, run.artifacts, 3.0, None)
    assert raw(tmp_path)["scores"]["teacher"]["hpo_classes"] == {}


# -- training data ------------------------------------------------------------------------------------------


def test_mix_configured_and_realised(written: Path) -> None:
    mixes = raw(written)["mixes"]
    first = mixes["stream_stage_1"]
    assert {name: mixed["asked"] for name, mixed in first.items()} == pytest.approx(dict.fromkeys(first, 1 / 3))
    assert {name: mixed["realised"] for name, mixed in first.items()} == {"cwe": 0.4, "hpo": 0.3, "code": 0.3}
    assert first["cwe"] | {"asked": 0} == {
        "task": "retrieval", "weight": 2.0, "asked": 0, "rows": 320, "realised": 0.4, "usable": 400, "epochs": 0.8,
    }  # fmt: skip
    student = mixes["stream_student"]
    assert {name: (mixed["realised"], mixed["asked"], mixed["epochs"]) for name, mixed in student.items()} == {
        "cwe": (0.75, None, 2.5), "hpo_classes": (0.25, None, 2.5),
    }  # fmt: skip
    text = Page((written / "report.html").read_text()).text
    assert "stream_stage_2: tasks task configured realised retrieval 75.0 % 75.0 % classification 25.0 % 25.0 %" in text


edges = [round(-1 + 0.25 * i, 2) for i in range(9)]
binned = st.lists(st.integers(0, 50), min_size=8, max_size=8).filter(any)


@given(binned, binned)
def test_negatives_quality(positives: list[int], negatives: list[int]) -> None:
    histograms = {"edges": edges, "positives": positives, "negatives": negatives}
    quality = negatives_quality({"datasets": {"x": {"score_histograms": histograms}}})["x"]
    middles = np.array(edges[:-1]) + 0.125
    assert quality.positive == pytest.approx(np.average(middles, weights=positives))
    assert quality.negative == pytest.approx(np.average(middles, weights=negatives))
    shares = np.array(positives) / sum(positives), np.array(negatives) / sum(negatives)
    assert quality.overlap == pytest.approx(np.minimum(*shares).sum())
    median = quantile(edges, positives, 0.5)
    assert share_above(edges, positives, median) == pytest.approx(0.5)
    assert (
        quality.above_median == pytest.approx(share_above(edges, negatives, median)) and 0 <= quality.above_median <= 1
    )


def test_the_audit_is_on_the_page(written: Path) -> None:
    page = (written / "report.html").read_text()
    for caption, numbers in {
        "Ranks of the positives for the retriever": ["60.0 %", "20.0 %"],
        "Candidates each ceiling would reject": ["2.5 %", "6.6 %"],
        "Texts embedded for mining": ["4031", "7.4 %", ">2<", "is empty"],
        "Negatives per example, most frequent negatives, near duplicates": [
            "4: 990",
            "812",
            "37",
            "4.3 %",
            "0.8 %",
            "1.1 %",
        ],
    }.items():
        table = re.search(rf"<caption><div>{caption}.*?</table>", page, re.DOTALL)
        assert table and all(number in html.unescape(table[0]) for number in numbers), caption


def test_sets_without_scores_have_no_quality() -> None:
    histograms = {"edges": edges, "positives": [0] * 8, "negatives": [1] * 8}
    assert negatives_quality({"datasets": {"x": {"score_histograms": histograms}}}) == {}
    assert negatives_quality(None) == {}


def test_restarts_and_gaps(written: Path) -> None:
    training = raw(written)["training"]
    assert training["train_stage_1"]["restarts"] == []
    restarts = training["train_stage_2"]["restarts"]
    assert [row["step"] for row in restarts] == [12, 12]
    rows = [json.loads(line) for line in (written / "train_stage_2" / "metrics.jsonl").read_text().splitlines()]
    for key, row in (("first_gap", rows[0]), ("last_gap", rows[-1])):
        assert training["train_stage_2"][key] == row["positive_similarity"] - row["hardest_similarity"]
    assert training["train_student"]["first_gap"] is None
    page = Page((written / "report.html").read_text())
    assert "train_stage_2: gap" in page.text and "train_student: gap" not in page.text
    labels = [attributes["aria-label"] for name, attributes in page.tags if name == "svg"]
    marked = [label for label in labels if label and "restarted at optimiser step 12, 12" in label]
    assert len(marked) == 2
    heads = [
        attributes for name, attributes in page.tags if name == "polygon" and attributes.get("class") == "mark-head"
    ]
    assert len(heads) == 2  # one place, in the loss and in the gap


def test_sizes_and_means(written: Path) -> None:
    report = raw(written)
    sizes = report["sizes"]
    assert sizes["teacher"]["parameters"] == 49_545_216 and sizes["student"]["encode_seconds"] == 10.9
    assert sizes["untrained"]["parameters"] == 40  # without its pooling head
    assert {size["dim"] for name, size in sizes.items() if name != "minilm"} == {576}
    for system in ("teacher", "student@288"):
        table = {**report["scores"], **report["other_scores"]}[system]
        mean = report["means"][system]
        values = [table[name]["ndcg_at_10"]["value"] for name in ("cwe", "hpo", "code")]
        assert mean["low"] < mean["value"] < mean["high"] and mean["value"] == pytest.approx(np.mean(values))
    text = Page((written / "report.html").read_text()).text
    assert "Quality by size" in text and "Quality by encode cost" in text and "1.15 GB" in text


def test_lineage_is_a_chain(written: Path) -> None:
    report = read_report(str(written / "report.json"))
    assert ancestors(report, "train_stage_2") == [
        "prepare", "initialise", "mine", "stream_stage_1", "train_stage_1", "stream_stage_2", "train_stage_2",
    ]  # fmt: skip
    text = Page((written / "report.html").read_text()).text
    assert "How the student was made prepare" in text
    assert "stream_student " + report.lineage["stream_student"].manifest_hash[:12] + " from " in text


# -- the champion -----------------------------------------------------------------------------------------------------


def champion(datasets: dict[str, str]) -> dict[str, Any]:
    scores = {name: {"ndcg_at_10": {"value": 0.9, "low": 0.8, "high": 0.95}} for name in ("cwe", "hpo", "code")}
    mean = {"value": 0.9, "low": 0.87, "high": 0.925}
    return {"version": "7", "scores": {"model": scores, "model@288": {}}, "mean": mean, "evaluation_hash": datasets}


def test_champion_is_in_the_table(tmp_path: Path, make_run: Callable[..., Any]) -> None:
    hashes = {name: storage.hash_json(name) for name in ("cwe", "hpo", "code")}
    out = write_run(tmp_path, make_run, student=False, champion=champion(hashes))
    assert raw(out)["champions"]["teacher"]["other_sets"] == []
    text = Page((out / "report.html").read_text()).text
    assert "teacher champion before: version 7" in text and "evaluation hashes differ" not in text
    assert "teacher champion before ★ best: 0.900 0.870–0.925 ★" in text  # its mean's interval, then the first set


def test_a_champions_mean_has_an_interval_only_over_the_same_sets(tmp_path: Path, make_run: Callable[..., Any]) -> None:
    """A champion registered without its mean, and one with another retrieval set."""
    hashes = {name: storage.hash_json(name) for name in ("cwe", "hpo", "code")}
    older, wider = champion(hashes), champion(hashes)
    del older["mean"]
    wider["scores"]["model"]["another"] = {"ndcg_at_10": {"value": 0.5, "low": 0.4, "high": 0.6}}
    for number, before in enumerate((older, wider)):
        out = write_run(tmp_path / str(number), make_run, student=False, champion=before)
        assert "0.870–0.925" not in Page((out / "report.html").read_text()).text


def test_a_champion_of_other_examples_is_never_best(tmp_path: Path, make_run: Callable[..., Any]) -> None:
    hashes = {"cwe": "another", "hpo": storage.hash_json("hpo"), "code": storage.hash_json("code")}
    out = write_run(tmp_path, make_run, student=False, champion=champion(hashes))
    assert raw(out)["champions"]["teacher"]["other_sets"] == ["cwe"]
    text = Page((out / "report.html").read_text()).text
    assert "were not this run's in cwe (the evaluation hashes differ)" in text
    starred, marked = "★ best: 0.900 0.800–0.950", "≠ other examples: 0.900 0.800–0.950"
    assert f"teacher champion before – {starred} {marked} {starred}" in text  # no mean; code, cwe, hpo


@pytest.mark.parametrize("change", [{"schema_version": 2}, {"mixes": None}, {"another": {}}])
def test_a_report_of_another_version_is_refused(written: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    foreign = {key: value for key, value in (raw(written) | change).items() if value is not None}
    (tmp_path / "report.json").write_text(json.dumps(foreign))
    key, again = next(iter(change)), re.escape(f"nvembed report {tmp_path}")
    with pytest.raises(UserError, match=rf"report\.json is not a report .*\({key}: .* write it again .*{again}"):
        read_report(str(tmp_path / "report.json"))


# -- report.html ----------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_self_contained(written: Path) -> None:
    html = (written / "report.html").read_text()
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|src=", html)
    links = [attributes["href"] for name, attributes in page.tags if "href" in attributes]
    assert {"script", "link", "img", "iframe"}.isdisjoint(name for name, _ in page.tags)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert links and set(links) == {f"#{name}" for name in ids}, "links stay on the page, and every section has one"
    assert html.index('charset="utf-8"') < 1024


def test_page_is_accessible(written: Path) -> None:
    page = Page((written / "report.html").read_text())
    assert ("html", {"lang": "en"}) in page.tags
    drawings = [attributes for name, attributes in page.tags if name == "svg"]
    assert len(drawings) == 5 + 3 + 2 + 3 + 2  # data sets, loss and gap curves, mining, sizes
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in drawings)
    assert page.count("desc") == len(drawings)
    heads = [attributes for name, attributes in page.tags if name == "th"]
    assert heads and all(attributes["scope"] in ("col", "row") for attributes in heads)
    assert page.count("caption") == page.count("table")


def test_page_shows_the_main_facts(written: Path) -> None:
    text = Page((written / "report.html").read_text()).text
    report = raw(written)
    assert f"{report['scores']['teacher']['cwe']['ndcg_at_10']['value']:.3f}" in text
    for text_part in (
        "best: 0.",
        "untrained backbone",
        "The labels of this set are synthetic.",
        "by CVE id: all descriptions of a CVE are in one split",
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
        assert text_part in text, text_part


def test_everything_is_escaped(tmp_path: Path, make_run: Callable[..., Any]) -> None:
    bad = "<script>alert(1)</script>\"&'"
    out = write_run(tmp_path, make_run, rename={"cwe": bad})
    html = (out / "report.html").read_text()
    page = Page(html)
    assert page.count("script") == 0 and "<script" not in html
    assert bad in page.text
    assert any(attributes.get("aria-label", "").startswith(bad) for _, attributes in page.tags)
