"""BM25: ranks by shared words, stop words ignored, ties by id, no results without a shared word."""

from nvembed.retrieval.bm25 import search_bm25

IDS = ["d3", "d1", "d2", "d4"]
TEXTS = ["the buffer overflow", "heap overflow of a buffer in C", "heap overflow of a buffer in C", "the and of"]


def test_equal_documents_come_in_id_order_and_stop_words_find_nothing():
    ids, scores = search_bm25(IDS, TEXTS, ["Heap overflow", "the of and", "unseen words"], 3)
    assert ids[0][:2] == ["d1", "d2"]
    assert scores[0][0] == scores[0][1] > scores[0][2]
    assert ids[0][2] == "d3"
    assert ids[1] == [] and ids[2] == []


def test_k_cuts_a_tie_by_id_whatever_the_corpus_order():
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        ids, _ = search_bm25([IDS[i] for i in order], [TEXTS[i] for i in order], ["heap"], 1)
        assert ids == [["d1"]]
