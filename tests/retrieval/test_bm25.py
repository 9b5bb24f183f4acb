"""BM25: ranks by shared words, stop words ignored, ties by id, no results without a shared word."""

from nvembed.retrieval.bm25 import Bm25Index, part_words, search_bm25

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


def test_chinese_and_japanese_are_found_by_character_pairs():
    texts = ["缓冲区溢出是一种漏洞", "跨站脚本攻击", "バッファオーバーフローの脆弱性", "the buffer overflow 漏 in C"]
    ids, _ = search_bm25(
        ["zh1", "zh2", "ja", "en"], texts, ["什么是缓冲区溢出?", "オーバーフロー", "overflow", "漏"], 3
    )
    assert ids[0][0] == "zh1" and "zh2" not in ids[0]
    assert ids[1] == ["ja"] and ids[2] == ["en"]
    assert ids[3] == ["en"]  # a lone character is a word


def test_text_without_such_characters_is_parted_as_before():
    text = "Naïve café, größe x1 — 'the' données Привет 한국어 텍스트"
    assert part_words(text) == text
    assert part_words("C言語の本 and 猫") == "C 言語 語の の本  and  猫猫 "


def test_scores_of_documents_that_are_asked_about():
    index = Bm25Index(IDS, TEXTS)
    ids, scores, asked = index.search(["heap overflow"], 4, [["d3", "d4", "d1"]])
    found = dict(zip(ids[0], scores[0].tolist(), strict=True))
    assert asked == [[found["d3"], 0.0, found["d1"]]]
