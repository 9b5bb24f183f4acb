"""What was mined: how good the negatives are, what was refused, where positives rank, what repeats.

Texts of the audit's samples stay in `audit.json`: a report is passed on, a corpus may be private.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvembed.report.charts import bar_chart
from nvembed.report.markup import Content, Markup, table, tag
from nvembed.report.schema import Report
from nvembed.report.words import Section, percent, section

REASONS = {
    "known_positive": "known positive",
    "duplicate_of_positive_or_query": "same text as the positive or query",
    "too_close_to_positive": "too close to the positive",
    "repeats_a_kept_negative": "repeats a kept negative",
    "nearly_repeats_a_positive": "nearly repeats a positive",
    "candidate_filter_finds_too_close": "the judge finds it too close",
}


def mining_section(report: Report) -> Section | None:
    """What was mined, how good the negatives are, what was refused, and how the scores lie."""
    if report.mining is None:
        return None
    sets: Mapping[str, Any] = report.mining["datasets"]
    rows: list[list[Content]] = [
        [
            name,
            audit["examples"],
            audit["mined"],
            sum(audit["dropped"].values()),
            audit["negatives"],
            percent(audit["with_fewer_share"]),
            tag("span", audit["way"], class_="wrap"),
        ]
        for name, audit in sets.items()
    ]
    head = ["data set", "examples", "mined", "dropped", "negatives", "fewer than asked", "way"]
    charts = []
    for name, audit in sets.items():
        series = {kind: audit["score_histograms"][kind] for kind in ("positives", "negatives", "rejected")}
        if any(any(counts) for counts in series.values()):
            edges = audit["score_histograms"]["edges"]
            charts.append(bar_chart(f"{name}: scores", "similarity to the query", "share", edges, series))
    return section(
        "Negatives",
        table("What was mined", head, rows),
        _texts(sets),
        *_quality(report),
        _refused(sets),
        _by_rule(sets),
        _ranks(sets),
        _repeats(sets),
        tag("div", *charts, class_="charts") if charts else None,
    )


def _texts(sets: Mapping[str, Any]) -> Markup | None:
    """Of which texts only the first tokens were embedded, and which have no vector, by model."""
    rows: list[list[Content]] = [
        [
            name,
            place,
            side,
            told["texts"],
            percent(told["truncated_share"]) or "unknown",
            sum(told["rejected"].values()),
            tag("span", "; ".join(told["rejected"]), class_="wrap"),
        ]
        for name, audit in sets.items()
        for place, sides in audit.get("encoded", {}).items()
        for side, told in sides.items()
    ]
    head = ["data set", "model", "texts of", "texts", "truncated", "without a vector", "why"]
    return table("Texts embedded for mining", head, rows) if rows else None


def _quality(report: Report) -> list[Markup]:
    if not report.negatives:
        return []
    rows: list[list[Content]] = [
        [
            name,
            f"{found.positive:.3f}",
            f"{found.negative:.3f}",
            f"{found.positive - found.negative:.3f}",
            percent(found.above_median),
            percent(found.overlap),
        ]
        for name, found in report.negatives.items()
    ]
    head = ["data set", "positives", "negatives", "gap", "above the median positive", "overlap"]
    said = (
        "Scores of the retriever, means over texts. Good negatives lie near the positives and rarely above them: a "
        "negative that scores above the median positive of its data set may be an answer nobody labelled. Overlap: "
        "the common area of both histograms."
    )
    return [table("Quality of the kept negatives", head, rows), tag("p", said, class_="quiet")]


def _refused(sets: Mapping[str, Any]) -> Markup | None:
    reasons = list(dict.fromkeys(reason for audit in sets.values() for reason in audit["rejected"]))
    rows: list[list[Content]] = [
        [
            name,
            audit["candidates_decided"],
            *(percent(audit["rejected"].get(reason, {"share": 0.0})["share"]) for reason in reasons),
        ]
        for name, audit in sets.items()
        if audit["candidates_decided"]
    ]
    head = ["data set", "candidates", *(REASONS.get(reason, reason.replace("_", " ")) for reason in reasons)]
    return table("Candidates refused, by reason", head, rows) if rows else None


def _ranks(sets: Mapping[str, Any]) -> Markup | None:
    """Rank of each positive among all documents: a good retriever finds them early, labels that are wrong lie deep."""
    found = {name: audit["positive_ranks"] for name, audit in sets.items() if audit.get("positive_ranks")}
    buckets = sorted({bucket for ranks in found.values() for bucket in ranks}, key=_bucket_order)
    rows: list[list[Content]] = [
        [name, *(percent(ranks.get(bucket, 0) / sum(ranks.values())) for bucket in buckets)]
        for name, ranks in found.items()
    ]
    return table("Where the positives rank for the retriever", ["data set", *buckets], rows) if rows else None


def _bucket_order(bucket: str) -> tuple[bool, int]:
    return bucket.startswith(">"), int(bucket.strip(">").split("-")[0])


def _by_rule(sets: Mapping[str, Any]) -> Markup | None:
    """What each of NV-Retriever's ceilings would refuse of the same candidates."""
    found = {name: audit["refused_by_rule"] for name, audit in sets.items() if audit.get("refused_by_rule")}
    rules = list(dict.fromkeys(rule for shares in found.values() for rule in shares))
    rows: list[list[Content]] = [
        [name, *(percent(shares[rule]["share"]) if rule in shares else None for rule in rules)]
        for name, shares in found.items()
    ]
    return table("Candidates each ceiling would refuse", ["data set", *rules], rows) if rows else None


def _repeats(sets: Mapping[str, Any]) -> Markup | None:
    """Documents that serve many queries, negatives that nearly repeat another text, and how many each example got."""
    rows: list[list[Content]] = []
    for name, audit in sets.items():
        hubs, copies = audit.get("hubs"), audit.get("near_duplicates")
        if not hubs or not hubs["documents"]:
            continue
        each = ", ".join(f"{count}: {examples}" for count, examples in audit["negatives_per_example"].items())
        rows.append(
            [
                name,
                each,
                hubs["documents"],
                hubs["largest"][0]["queries"] if hubs["largest"] else None,
                percent(hubs["share_of_top_percent"]),
                _share(copies, "near_duplicates_of_a_positive"),
                _share(copies, "near_duplicates_of_a_negative"),
            ]
        )
    head = [
        "data set", "examples by their negatives", "different negatives", "queries of the most used",
        "share of the top 1 %", "near a positive", "near another negative",
    ]  # fmt: skip
    return table("Negatives realised, hubs, near duplicates", head, rows) if rows else None


def _share(copies: Mapping[str, Any] | None, key: str) -> str | None:
    return percent(copies[key] / copies["negatives"]) if copies and copies["negatives"] else None
