"""Mining of a group of queries in plain Python, one query and one candidate at a time, written from the definitions of
the rules: what the selection over arrays is compared with, and timed against. Imports nothing of `nvembed.mining`.

A rule here is its keys: `{"type": "topk_perc_pos", "max_negative_to_positive_ratio": 0.95}`. A query is a row of its
shard, a search result a row with `positives`, `plain`, `under`, `above`, `ceiling` and the hashes beside them.
"""

import math
from collections import Counter

import xxhash

EDGES = [round(-1.0 + 0.05 * number, 2) for number in range(41)]
BUCKETS = [(1, 1), (2, 5), (6, 10), (11, 20), (21, 50), (51, 100)]
COMPARED = {
    "topk_abs 0.7": {"type": "topk_abs", "max_score": 0.7},
    "topk_margin_pos 0.05": {"type": "topk_margin_pos", "margin": 0.05},
    "topk_perc_pos 0.95": {"type": "topk_perc_pos", "max_negative_to_positive_ratio": 0.95},
}


class NeedsSearch(Exception):
    """The selection depends on documents that were not searched."""


def ceiling(rule, lowest):
    """What a negative's score must stay below; `lowest`: the lowest score among the positives."""
    if rule["type"] == "topk_perc_pos":
        return lowest - (1.0 - rule["max_negative_to_positive_ratio"]) * abs(lowest)
    if rule["type"] == "topk_margin_pos":
        return lowest - rule["margin"]
    if rule["type"] == "topk_abs":
        return rule["max_score"]
    return ceiling(rule["ceiling"], lowest) if rule["type"] == "sampled_topk" else math.inf


def allowed_ranks(rule):
    if rule["type"] == "topk_shifted":
        return rule["shift"] + 1, math.inf
    return (rule["first"], rule["last"]) if rule["type"] == "rank_window" else (1, math.inf)


def ranked(row, depth):
    """[(rank, id, score, hash)] as far as it was searched, the missing ranks in between, and whether nothing is
    missing behind the last."""
    plain, under = (
        [(item["id"], item["score"], digest) for item, digest in zip(row[name], row[f"{name}_hashes"], strict=True)]
        for name in ("plain", "under")
    )
    candidates = [(rank, *item) for rank, item in enumerate(plain, start=1)]
    if len(plain) < depth:
        return candidates, None, True
    if not math.isfinite(row["ceiling"]):
        return candidates, None, False
    behind = [(row["above"] + place, *item) for place, item in enumerate(under, start=1)]
    behind = [item for item in behind if item[0] > len(plain)]
    gap = (len(plain) + 1, row["above"]) if row["above"] > len(plain) else None
    return candidates + behind, gap, len(under) < depth


def first_negatives(candidates, query, hashes, rule, top, count, refuse=None):
    """Ids, scores and hashes of the first `count` that may be negatives; and by place why others are none."""
    first, last = allowed_ranks(rule)
    chosen, reasons = [], {}
    for place, (rank, key, score, digest) in enumerate(candidates):
        if len(chosen) == count:
            break
        if key in query["never"]:
            reasons[place] = "known_positive"
        elif digest == query["hash"] or digest in hashes:
            reasons[place] = "duplicate_of_positive_or_query"
        elif not score < top:
            reasons[place] = "too_close_to_positive"
        elif digest in [other for _, _, other in chosen]:
            reasons[place] = "repeats_a_kept_negative"
        elif not first <= rank <= last:
            reasons[place] = "outside_the_ranks"
        elif refuse is not None and (why := refuse(query, key)):
            reasons[place] = why
        else:
            chosen.append((key, score, digest))
    return chosen, reasons


def missing(candidates, gap, whole, row, rule, top, enough, decided, who):
    """Raise where the negatives among the known candidates may not be those among all."""
    first, last = allowed_ranks(rule)
    passed = not enough or (decided > 0 and gap is not None and candidates[decided - 1][0] > gap[0])
    if gap is not None and passed and top > row["ceiling"] and first <= gap[1] and gap[0] <= last:
        raise NeedsSearch(
            f"{who}: the rule needs ranks {gap[0]} to {gap[1]} (scores from {row['ceiling']:.4f} up), which were "
            f"not searched. Search to depth {gap[1]}, or with a rule whose ceiling is {top:.4f} or more."
        )
    end = candidates[-1][0] if candidates else 0
    if not enough and not whole and end < last:
        raise NeedsSearch(f"{who}: the rule needs ranks behind {end}, which were not searched.")


def gumbel(left, right):
    """Noise from two 64-bit keys."""

    def mix(key):
        key = (key + 0x9E3779B97F4A7C15) % 2**64
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) % 2**64
        return key ^ (key >> 31)

    return -math.log(-math.log(((mix(mix(left) ^ right) >> 11) + 0.5) * 2.0**-53))


def draw(pool, rule, count, seed, dataset, key):
    """The `count` largest noisy log-weights of the pool, in the pool's order."""
    own = xxhash.xxh3_64_intdigest(f"{seed}\0{dataset}\0{key}".encode())
    noise = [gumbel(own, xxhash.xxh3_64_intdigest(name.encode())) for name, _, _ in pool]
    if rule["temperature"] is not None:
        noise = [value + score / rule["temperature"] for value, (_, score, _) in zip(noise, pool, strict=True)]
    best = sorted(range(len(pool)), key=lambda place: -noise[place])[:count]
    return [pool[place] for place in sorted(best)]


def choice(config, query, rows, strict, refuse=None, dataset="set"):
    """The choice for a query: the retrievers' choices in turn, every text once.

    Args:
        config: the recipe's section as JSON.
        rows: each retriever's search result, the first one's first.
        strict: whether documents that were not searched are an error.
    """
    rule, capped, lists = config["rule"], config["max_per_document"] is not None, []
    wanted = rule["top"] if rule["type"] == "sampled_topk" else config["num_negatives"]
    for number, row in enumerate(rows):
        candidates, gap, whole = ranked(row, row.get("depth", config["depth"]))
        top = ceiling(rule, min(item["score"] for item in row["positives"]))
        chosen, reasons = first_negatives(
            candidates, query, row["never_hashes"], rule, top, config["depth"] if capped else wanted, refuse
        )
        if strict and number == 0 and not (capped and len(chosen) >= wanted):
            decided = len(chosen) + len(reasons)
            missing(candidates, gap, whole, row, rule, top, len(chosen) >= wanted, decided, f"example {query['key']!r}")
        if rule["type"] == "sampled_topk":
            chosen = draw(chosen, rule, config["num_negatives"], config["seed"], dataset, query["key"])
        lists.append(chosen)
    if len(lists) == 1:
        return lists[0]
    out, limit = [], config["depth"] if capped else config["num_negatives"]
    for place in range(max(map(len, lists))):
        for chosen in lists:
            if place < len(chosen) and len(out) < limit and chosen[place][2] not in [digest for _, _, digest in out]:
                out.append(chosen[place])
    return out


# -- the mined rows of a group and the audit's numbers ----------------------------------------------------------------


def histogram(scores):
    counts = [0] * (len(EDGES) - 1)
    for score in scores:
        counts[sum(score >= edge for edge in EDGES[1:-1])] += 1
    return counts


def bucket(rank, depth):
    if rank is None:
        return f">{depth}"
    for low, high in BUCKETS:
        if low <= rank <= high:
            return str(low) if low == high else f"{low}-{high}"
    return f"101-{depth}"


def mine(config, queries, results, strict, refuse=None):
    """Mined rows and the audit's numbers of a group.

    Args:
        queries: rows of the shards of queries.
        results: for each retriever the queries' search results.

    Raises:
        NeedsSearch: `strict`, and a selection depends on documents that were not searched.
    """
    counts, rejected, per_example, ranks, by_rule = (Counter() for _ in range(5))
    scores = {"positives": [], "negatives": [], "rejected": []}
    mined = []
    for query, *rows in zip(queries, *results, strict=True):
        row, rule = rows[0], config["rule"]
        chosen = choice(config, query, rows, strict, refuse)
        candidates = ranked(row, row.get("depth", config["depth"]))[0][: len(row["plain"])]
        by_id = {item["id"]: item["score"] for item in row["positives"]}
        capped = config["max_per_document"] is not None
        wanted = rule["top"] if rule["type"] == "sampled_topk" else config["num_negatives"]
        top, wanted = ceiling(rule, min(by_id.values())), config["depth"] if capped else wanted
        in_plain, reasons = first_negatives(candidates, query, row["never_hashes"], rule, top, wanted)
        rejected.update(reasons.values())
        counts["candidates_decided"] += len(in_plain) + len(reasons)
        scores["rejected"] += [candidates[place][2] for place in reasons]
        counts["deepened"] += len(in_plain) < config["num_negatives"]
        own = query["positives"][: query["own"]]
        places = {key: rank for rank, key, _, _ in candidates}
        ranks.update(bucket(places.get(key), config["depth"]) for key in own)
        scores["positives"] += [by_id[key] for key in own]
        others = [score for _, key, score, _ in candidates if key not in by_id]
        counts["compared"] += len(others)
        for name, compared in COMPARED.items():
            by_rule[name] += sum(score >= ceiling(compared, min(by_id.values())) for score in others)
        best = min((places[key] for key in own if key in places), default=math.inf)
        if config["max_positive_rank"] is not None and best > config["max_positive_rank"]:
            counts["inconsistent"] += 1
            continue
        mined.append(mined_row(config, query, by_id, own, chosen, counts))
        if not capped:
            negatives = mined[-1]["negatives"]
            counts.update(mined=1, negatives=len(negatives), with_fewer=len(negatives) < config["num_negatives"])
            per_example[str(len(negatives))] += 1
            scores["negatives"] += [item["score"] for item in negatives if item["score"] is not None]
    named = {"counts": counts, "rejected": rejected, "per_example": per_example, "positive_ranks": ranks}
    numbers = {name: dict(+counter) for name, counter in {**named, "refused_by": by_rule}.items()}
    return mined, {**numbers, "histograms": {name: histogram(values) for name, values in scores.items()}}


def mined_row(config, query, by_id, own, chosen, counts):
    given = [key for key in dict.fromkeys(query["given"]) if key not in query["never"]][: config["num_negatives"]]
    counts["given"] += len(given)
    negatives = [{"id": key, "score": None} for key in given]
    negatives += [{"id": key, "score": score} for key, score, _ in chosen if key not in given]
    if config["max_per_document"] is None:
        negatives = negatives[: config["num_negatives"]]
    positives = [{"id": key, "score": by_id[key]} for key in own]
    known = sorted(set(query["never"]))
    return {"example_id": query["key"], "positives": positives, "negatives": negatives, "known_positives": known}
