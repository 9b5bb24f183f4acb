"""Near duplicates and contained queries: against datasketch and plain Python, in one shard and many, with Ray."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH
from datasketch.lsh import _optimal_param
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_shingles import shingles

from nvembed.data.config import NearDuplicateConfig
from nvembed.data.dedup.contained import contained_pairs
from nvembed.data.dedup.minhash import WordHashes, band_shape, runs, signatures
from nvembed.data.dedup.near import Text, near_pairs, write_texts
from nvembed.text.identity import jaccard, words_of

CONFIG = NearDuplicateConfig()
TEXT = st.text(st.sampled_from("ab .é日\U0001f916"), max_size=30)


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests may have started Ray, which takes longer than these small tasks."""
    if "ray_session" not in request.fixturenames:
        monkeypatch.setattr("nvembed.core.ray_tasks.sys", SimpleNamespace(modules={}))


def some_texts(count: int, seed: int) -> list[str]:
    """Texts of 1 to 40 words, a third of them with one to three words of an earlier one changed."""
    draw, result = random.Random(seed), list[str]()
    vocabulary = [f"w{number}" for number in range(300)]
    for _ in range(count):
        words = draw.choices(vocabulary, k=draw.randint(1, 40))
        if result and draw.random() < 0.33:
            words = draw.choice(result).split()
            for _ in range(draw.randint(0, 3)):
                words[draw.randrange(len(words))] = draw.choice(vocabulary)
        result.append(" ".join(words))
    return result


def plain_pairs(texts: list[Text], sides: tuple[tuple[int, int], ...], threshold: float) -> set[tuple[int, int]]:
    sets = [shingles(text, CONFIG.shingle_words) for _, _, text in texts]
    return {
        (a, b)
        for a in range(len(texts))
        for b in range(len(texts))
        if (texts[a][0], texts[b][0]) in sides
        and (a < b if texts[a][0] == texts[b][0] else True)
        and jaccard(sets[a], sets[b]) >= threshold
    }


@given(st.lists(TEXT, min_size=1, max_size=8), st.integers(1, 4))
def test_hashed_shingles_are_the_shingles(texts: list[str], words: int) -> None:
    """Equal where the strings are equal, different where they differ, in the same order."""
    hashed = runs(WordHashes().words(texts), words)
    by_string: dict[bytes, int] = {}
    for row, text in enumerate(texts):
        tokens = words_of(text)
        places = range(max(len(tokens) - words + 1, 1))
        strings = [
            " ".join(tokens[place : place + words] if len(tokens) > words else tokens).encode() for place in places
        ]
        values = hashed.row(row).tolist()
        assert len(values) == len(strings) and set(strings) == shingles(text, words)
        for string, value in zip(strings, values, strict=True):
            assert by_string.setdefault(string, value) == value
    assert len(set(by_string.values())) == len(by_string)


@pytest.mark.parametrize(("num_perm", "seed"), [(64, 1), (64, 2), (128, 7)])
def test_signatures_are_those_of_datasketch(num_perm: int, seed: int) -> None:
    hashed = runs(WordHashes().words(some_texts(40, seed)), 3)
    result = signatures(hashed, num_perm, seed)
    for row in range(40):
        sketch = MinHash(num_perm=num_perm, seed=seed, hashfunc=lambda value: int(value) & 0xFFFFFFFF)
        sketch.update_batch(list(hashed.row(row)))
        assert (sketch.hashvalues == result[row]).all()


@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.45])
def test_bands_are_cut_as_datasketch_cuts_them(threshold: float) -> None:
    assert band_shape(threshold, 64) == _optimal_param(threshold, 64, 0.5, 0.5)


def test_pairs_are_those_of_datasketch_confirmed(tmp_path: Path) -> None:
    texts = some_texts(400, 3)
    lsh = MinHashLSH(threshold=CONFIG.threshold / 2, num_perm=CONFIG.num_perm)
    hashed = runs(WordHashes().words(texts), CONFIG.shingle_words)
    sketches = []
    for row in range(len(texts)):
        sketch = MinHash(num_perm=CONFIG.num_perm, seed=1, hashfunc=lambda value: int(value) & 0xFFFFFFFF)
        sketch.update_batch(list(hashed.row(row)))
        lsh.insert(row, sketch)
        sketches.append(sketch)
    sets = [shingles(text, CONFIG.shingle_words) for text in texts]
    oracle = {
        (a, b)
        for b, sketch in enumerate(sketches)
        for a in lsh.query(sketch)
        if a < b and jaccard(sets[a], sets[b]) >= CONFIG.threshold
    }
    result = near_pairs(write_texts(((0, False, text) for text in texts), str(tmp_path)), CONFIG, split_pairs=((0, 0),))
    first = result.first_same.tolist()
    ours = {(a, b) for a, b in result.pairs.tolist()}
    distinct = {(a, b) for a, b in oracle if first[a] == a and first[b] == b}
    assert ours == distinct and len(ours) > 5
    assert {(a, b) for a, b in oracle if words_of(texts[a]) == words_of(texts[b])} == {
        (a, b) for a in range(400) for b in range(a + 1, 400) if first[a] == first[b]
    }


@pytest.mark.parametrize("sides", [((0, 0),), ((0, 1), (0, 2), (1, 2))])
@pytest.mark.parametrize("shard_rows", [30, 64, 1000])
def test_any_number_of_shards_finds_what_all_against_all_finds(
    tmp_path: Path, shard_rows: int, sides: tuple[tuple[int, int], ...]
) -> None:
    texts: list[Text] = [(place % 3, False, text) for place, text in enumerate(some_texts(200, 5))]
    shards = write_texts(iter(texts), str(tmp_path), shard_rows)
    assert shards.shards == -(-200 // shard_rows)
    result = near_pairs(shards, CONFIG, split_pairs=sides)
    first = result.first_same.tolist()
    assert all(first[place] <= place and texts[first[place]][0] == texts[place][0] for place in range(200))
    expanded = {
        (a, b)
        for x, y in result.pairs.tolist()
        for a in range(200)
        for b in range(200)
        if first[a] == x and first[b] == y
    }
    if (0, 0) in sides:
        expanded |= {(a, b) for a in range(200) for b in range(a + 1, 200) if first[a] == first[b] and texts[a][0] == 0}
        expanded = {(min(pair), max(pair)) for pair in expanded}
    plain = plain_pairs(texts, sides, CONFIG.threshold)
    assert expanded <= plain
    assert len(plain - expanded) <= 0.01 * len(plain)  # what LSH may miss


def test_nothing_and_odd_texts(tmp_path: Path) -> None:
    nothing = write_texts(iter(()), str(tmp_path / "none"))
    assert len(near_pairs(nothing, CONFIG, split_pairs=((0, 1),)).pairs) == 0
    assert len(contained_pairs(nothing, 3, split_pairs=((0, 1),))) == 0
    odd = ["", " ", "\ud800", "!!", "one", "日本語", "x" * 200_000]
    texts = write_texts(((side, True, text) for side in (0, 1) for text in odd), str(tmp_path / "odd"))
    result = near_pairs(texts, CONFIG, split_pairs=((0, 1),))
    assert {(a, b - len(odd)) for a, b in result.pairs.tolist()} >= {(place, place) for place in (0, 2, 3, 4, 5, 6)}
    assert result.first_same.tolist()[1] == 0  # both have no word


def plain_contained(texts: list[Text], words: int, sides: tuple[tuple[int, int], ...]) -> set[tuple[int, int]]:
    tokens = [words_of(text) for _, _, text in texts]
    result = set()
    for a, (side, query, _) in enumerate(texts):
        for b, (other, _, _) in enumerate(texts):
            if not query or len(tokens[a]) < words or a == b or (side, other) not in sides:
                continue
            if any(tokens[b][at : at + len(tokens[a])] == tokens[a] for at in range(len(tokens[b]))):
                result.add((a, b))
    return result


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 1), st.booleans(), TEXT), max_size=14), st.integers(1, 4), st.integers(1, 5))
def test_contained_queries_are_all_found(
    tmp_path_factory: pytest.TempPathFactory, texts: list[Text], words: int, shard_rows: int
) -> None:
    shards = write_texts(iter(texts), str(tmp_path_factory.mktemp("contained")), shard_rows)
    for sides in (((0, 1),), ((0, 1), (1, 0))):
        result = contained_pairs(shards, words, split_pairs=sides)
        assert {(a, b) for a, b in result.tolist()} == plain_contained(texts, words, sides)
        assert len(result) == len(np.unique(result, axis=0))


@pytest.mark.slow
@pytest.mark.ray
def test_ray_data_finds_the_same(ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    texts: list[Text] = [(place % 2, place % 4 == 0, text) for place, text in enumerate(some_texts(120, 9))]
    texts += [(1, False, f"before {text} after") for _, query, text in texts[:20] if query]
    shards = write_texts(iter(texts), str(tmp_path), 40)

    def both() -> tuple[list[list[int]], list[list[int]]]:
        result = near_pairs(shards, CONFIG, split_pairs=((0, 1),)).pairs
        return result.tolist(), contained_pairs(shards, 4, split_pairs=((0, 1),)).tolist()

    with monkeypatch.context() as disconnected:
        disconnected.setattr(ray, "is_initialized", lambda: False)
        alone = both()
    assert both() == alone and alone[0] and alone[1]
