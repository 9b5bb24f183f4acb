"""FAISS proposes, fp64 scores: flat equals the exact search, the approximate ones find most of it."""

import numpy as np
import pytest

from nvembed.retrieval.ann import FaissPart
from nvembed.retrieval.config import FaissFlat, FaissHnsw, FaissIvf
from nvembed.retrieval.exact.search import search_shards

pytest.importorskip("faiss")


@pytest.mark.parametrize("config", [FaissFlat(), FaissIvf(lists=16, probes=8), FaissHnsw(links=16)])
def test_candidates_are_rescored_and_most_are_there(config):
    generator = np.random.default_rng(0)
    documents = generator.standard_normal((2000, 16)).astype(np.float32)
    query = generator.standard_normal((50, 16)).astype(np.float32)
    ids = np.array([f"d{number:04d}" for number in range(2000)], dtype=object)
    exact = search_shards(query, [(ids, documents)], plain=10)
    ceiling = exact.plain.scores_QK[:, 4].copy()
    exact = search_shards(query, [(ids, documents)], plain=10, under=5, ceiling_Q=ceiling, count_above=True)
    part = FaissPart(config, ids, documents)
    found = part.search(query, plain=10, under=5, ceiling_Q=ceiling)
    if isinstance(config, FaissFlat):
        for ours, theirs in ((found.plain, exact.plain), (found.under, exact.under)):
            assert ours.ids_QK.tolist() == theirs.ids_QK.tolist()
            assert ours.scores_QK.tobytes() == theirs.scores_QK.tobytes()
        assert found.above_Q.tolist() == exact.above_Q.tolist() == [5] * 50
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.plain.ids_QK, exact.plain.ids_QK, strict=True)])
    assert recall > 0.8
    part.search(query, plain=50, under=0)  # another depth in between changes nothing
    for again in (part, FaissPart(config, ids, documents)):
        same = again.search(query, plain=10, under=5, ceiling_Q=ceiling)
        assert same.plain.ids_QK.tolist() == found.plain.ids_QK.tolist()


def test_an_empty_part_finds_nothing():
    found = FaissPart(FaissFlat(), np.array([], dtype=object), np.ones((0, 3))).search(np.ones((2, 3)), plain=2)
    assert np.isneginf(found.plain.scores_QK).all() and found.documents == 0
