"""BM25 (bm25s, Lucene variant, k1 1.5, b 0.75) as a baseline without training.

Tokenisation, stated because scores depend on it: lower-cased words of two or more word characters
(`(?u)\\b\\w\\w+\\b`), bm25s' English stop words removed, no stemming.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STOP_WORDS = "en"


def search_bm25(
    corpus_ids: Sequence[str], corpus_texts: Sequence[str], queries: Sequence[str], k: int
) -> tuple[list[list[str]], list[np.ndarray]]:
    """The best k documents per query; ties by id, ascending.

    Documents that share no word with the query (score 0) are not results, so a row may be shorter than k or empty.

    Returns:
        ids [Q][<= k] and one float32 array of scores per query.
    """
    import bm25s

    index = bm25s.BM25()
    order = np.argsort(np.array(corpus_ids, dtype=object), kind="stable")  # by id: a stable sort then settles ties
    texts = [corpus_texts[position] for position in order]
    tokens = bm25s.tokenize(texts, stopwords=STOP_WORDS, show_progress=False)
    index.index(tokens, show_progress=False)
    query_tokens = bm25s.tokenize(list(queries), stopwords=STOP_WORDS, return_ids=False, show_progress=False)
    ids, scores = [], []
    for words in query_tokens:
        known = index.get_tokens_ids(words)
        score_N = index.get_scores_from_ids(known) if len(known) else np.zeros(len(texts), dtype=np.float32)
        hits = np.flatnonzero(score_N > 0)
        if len(hits) > k:
            kth = np.partition(score_N[hits], len(hits) - k)[len(hits) - k]
            hits = hits[score_N[hits] >= kth]
        hits = hits[np.argsort(-score_N[hits], kind="stable")][:k]
        ids.append([corpus_ids[order[hit]] for hit in hits])
        scores.append(score_N[hits])
    return ids, scores
