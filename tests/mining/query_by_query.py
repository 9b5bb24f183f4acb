"""The selection of a group of queries in plain Python: what `retriever.selected` is held to, and timed against."""

from collections import Counter

import numpy as np

from nvembed.mining.audit import COMPARED_RULES, RANK_BUCKETS, SCORE_EDGES, rule_name
from nvembed.mining.choosing import Chooser
from nvembed.mining.rules import ceilings


def histogram(scores):
    values = np.clip(np.array(list(scores), dtype=np.float64), -1.0, 1.0)
    return np.histogram(values, bins=np.array(SCORE_EDGES))[0]


def bucket(rank, depth):
    if rank is None:
        return f">{depth}"
    for low, high in RANK_BUCKETS:
        if low <= rank <= high:
            return str(low) if low == high else f"{low}-{high}"
    return f"{RANK_BUCKETS[-1][1] + 1}-{depth}"


def selected(searcher, task, queries, lanes):
    """Mined rows and the audit's numbers of a group; the arguments are those of `retriever.selected`."""
    config, rows = searcher.config, queries.to_pylist()
    chooser = Chooser(searcher, task, rows, lanes)
    counters = {name: Counter() for name in ("counts", "rejected", "per_example", "positive_ranks", "refused_by")}
    shapes = {name: np.zeros(len(SCORE_EDGES) - 1, dtype=np.int64) for name in ("positives", "negatives", "rejected")}
    counts, mined = counters["counts"], []
    for query, row, choice in zip(rows, lanes[0].to_pylist(), chooser.run(), strict=True):
        counters["rejected"].update(reason.value for reason in choice.plain.rejected.values())
        counts["candidates_decided"] += len(choice.plain.kept) + len(choice.plain.rejected)
        shapes["rejected"] += histogram(row["plain"][place]["score"] for place in choice.plain.rejected)
        counts["deepened"] += len(choice.plain.kept) < config.num_negatives
        scores = {item["id"]: item["score"] for item in row["positives"]}
        own = query["positives"][: query["own"]]
        places = {item["id"]: place + 1 for place, item in enumerate(row["plain"])}
        ranks = [places.get(key) for key in own]
        counters["positive_ranks"].update(bucket(rank, config.depth) for rank in ranks)
        shapes["positives"] += histogram(scores[key] for key in own)
        others = np.array([item["score"] for item in row["plain"] if item["id"] not in scores])
        counts["compared"] += len(others)
        for rule in COMPARED_RULES:
            ceiling = ceilings(rule, np.array([min(scores.values())]))
            counters["refused_by"][rule_name(rule)] += int((others >= ceiling).sum())
        best = min((rank for rank in ranks if rank is not None), default=None)
        if config.max_positive_rank is not None and not (best is not None and best <= config.max_positive_rank):
            counts["inconsistent"] += 1
            continue
        kept = choice.kept if config.max_per_document is not None else choice.kept[: config.num_negatives]
        mined.append(mined_row(config, query, [{"id": key, "score": scores[key]} for key in own], kept, counts))
        if config.max_per_document is None:
            add_example(counters, shapes, mined[-1]["negatives"], config.num_negatives)
    dumped = {name: dict(+counter) for name, counter in counters.items()}
    return mined, {**dumped, "histograms": {name: shape.tolist() for name, shape in shapes.items()}}


def mined_row(config, query, positives, kept, counts):
    never = set(query["never"])
    given = [key for key in dict.fromkeys(query["given"]) if key not in never][: config.num_negatives]
    counts["given"] += len(given)
    negatives = [{"id": key, "score": None} for key in given]
    negatives += [{"id": key, "score": score} for key, score in kept if key not in given]
    if config.max_per_document is None:
        negatives = negatives[: config.num_negatives]
    known = sorted(never)
    return {"example_id": query["key"], "positives": positives, "negatives": negatives, "known_positives": known}


def add_example(counters, shapes, negatives, asked):
    counters["counts"].update(mined=1, negatives=len(negatives), with_fewer=int(len(negatives) < asked))
    counters["per_example"][str(len(negatives))] += 1
    shapes["negatives"] += histogram(item["score"] for item in negatives if item["score"] is not None)
