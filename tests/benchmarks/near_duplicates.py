"""Near duplicates inside a set: CPU seconds of our partitioned MinHash against datasketch's LSH, on real text.

    OMP_NUM_THREADS=1 python tests/benchmarks/near_duplicates.py [--rounds 3] [--large 100000]

Both find pairs of HPO definitions, CWE texts and standard library functions at a Jaccard similarity of 0.8 of 3-word
shingles, confirm them exactly, and must find the same texts. One thread, interleaved A B A B, medians and min..max.
The large run is ours alone: the same texts and varied copies of them, in shards, with the memory it added.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable

import xxhash
from datasketch import MinHash, MinHashLSH

from nvembed.data.config import CweSource, HpoRetrievalSource, NearDuplicateConfig, StdlibCodeSource
from nvembed.data.dedup.near import near_pairs, write_texts
from nvembed.data.sources.cwe import read_cwe
from nvembed.data.sources.hpo import read_hpo_retrieval
from nvembed.data.sources.stdlib_code import read_stdlib_code
from nvembed.data.tables import document_text
from nvembed.text.identity import jaccard, words_of

CONFIG = NearDuplicateConfig()


def real_texts() -> list[str]:
    """Documents and queries of the quickstart's three retrieval sets, in a fixed order."""
    sets = (
        read_cwe(CweSource(name="cwe", instruction="cwe")),
        read_hpo_retrieval(HpoRetrievalSource(name="hpo", instruction="hpo_retrieval")),
        read_stdlib_code(StdlibCodeSource(name="code", instruction="stdlib_code")),
    )
    found = [document_text(row.title, row.text) for rows in sets for row in rows.documents]
    found += [row.query for rows in sets for split in rows.examples.values() for row in split]
    return found


def shingles(text: str, words: int) -> frozenset[bytes]:
    """Runs of `words` consecutive words; a shorter text is one."""
    tokens = words_of(text)
    starts = range(max(len(tokens) - words + 1, 1))
    return frozenset(" ".join(tokens[start : start + words]).encode("utf-8", "surrogatepass") for start in starts)


def ours(texts: list[str], shard_rows: int = 65536) -> set[int]:
    """Texts that nearly copy an earlier one."""
    with tempfile.TemporaryDirectory() as folder:
        shards = write_texts(((0, False, text) for text in texts), folder, shard_rows)
        found = near_pairs(shards, CONFIG, split_pairs=((0, 0),))
    copied = set(found.pairs[:, 1].tolist())
    first = found.first_same.tolist()
    return {place for place in range(len(texts)) if first[place] != place or place in copied}


def peer(texts: list[str]) -> set[int]:
    """The same with datasketch, as it was done before: one index, exact confirmation on the candidates."""
    sets = [shingles(text, CONFIG.shingle_words) for text in texts]
    lsh = MinHashLSH(threshold=CONFIG.threshold / 2, num_perm=CONFIG.num_perm)
    known: set[frozenset[bytes]] = set()
    copied = set()
    sketches = MinHash.generator(sets, num_perm=CONFIG.num_perm, seed=1, hashfunc=xxhash.xxh32_intdigest)
    for place, (pieces, sketch) in enumerate(zip(sets, sketches, strict=True)):
        if pieces in known:
            copied.add(place)
            continue
        if any(jaccard(pieces, sets[other]) >= CONFIG.threshold for other in lsh.query(sketch)):
            copied.add(place)
        known.add(pieces)
        lsh.insert(place, sketch)
    return copied


def cpu(function: Callable[[list[str]], set[int]], texts: list[str]) -> tuple[float, set[int]]:
    start = time.process_time()
    found = function(texts)
    return time.process_time() - start, found


def enlarged(texts: list[str], count: int) -> list[str]:
    """The texts, then copies with 40 % of the words drawn anew, which are no near duplicates."""
    draw = random.Random(1)
    vocabulary = sorted({word for text in texts[:5000] for word in text.split()})
    found = list(texts)
    while len(found) < count:
        words = draw.choice(texts).split()
        found.append(" ".join(draw.choice(vocabulary) if draw.random() < 0.4 else word for word in words))
    return found[:count]


def report(seconds: dict[str, list[float]], texts: int) -> None:
    """Medians and the paired ratio."""
    for name, values in seconds.items():
        per = 100_000 / texts
        low, middle, high = (per * value for value in (min(values), statistics.median(values), max(values)))
        print(f"{name}: {middle:.1f} CPU s per 100k texts [{low:.1f}..{high:.1f}]")
    ratios = [a / b for a, b in zip(seconds["datasketch"], seconds["ours"], strict=True)]
    print(f"ratio datasketch / ours: {statistics.median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}]")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", type=int, default=100_000)
    options = parser.parse_args()
    texts = real_texts()
    words = sum(len(text.split()) for text in texts) / len(texts)
    print(f"{len(texts)} real texts, {words:.1f} words on average")
    seconds: dict[str, list[float]] = {"datasketch": [], "ours": []}
    for _ in range(options.rounds):
        for name, function in (("datasketch", peer), ("ours", ours)):
            spent, found = cpu(function, texts)
            seconds[name].append(spent)
            print(f"  {name}: {spent:.2f} CPU s, {len(found)} near duplicates of an earlier text")
    if options.rounds:
        report(seconds, len(texts))
    large = enlarged(texts, options.large)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent, found = cpu(lambda given: ours(given, 16384), large)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary = f"{len(large)} texts in shards of 16,384: {spent:.1f} CPU s, {len(found)} near duplicates"
    print(f"{summary}, peak + {(after - before) / 1024:.0f} MiB")  # alone with --rounds 0: a peak never falls


if __name__ == "__main__":
    main()
