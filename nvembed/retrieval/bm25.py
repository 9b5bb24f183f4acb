"""BM25 (bm25s, Lucene variant, k1 1.5, b 0.75): a baseline without training, and a retriever.

Tokenisation, stated because scores depend on it: lower-cased words of two or more word characters
(`(?u)\\b\\w\\w+\\b`), bm25s' English stop words removed, no stemming. Runs of Chinese characters and Japanese kana,
which no spaces part, become their overlapping character pairs (as Lucene's CJK analyser does); a lone character counts
double to be a word at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from nvembed.types import UserError

STOP_WORDS = "en"
# Han with its extensions and compatibility forms, the iteration mark, hiragana, katakana (full and half width)
_CJK_RUN = re.compile(
    "[\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]+"
)


def part_words(text: str) -> str:
    """The text with character pairs, parted by spaces, in place of each run of Chinese or Japanese characters."""
    return _CJK_RUN.sub(lambda run: f" {_pairs(run.group())} ", text)


def _pairs(run: str) -> str:
    return run * 2 if len(run) == 1 else " ".join(run[place : place + 2] for place in range(len(run) - 1))


class Bm25Index:
    """An index of a corpus in memory; ties by id, ascending."""

    def __init__(self, corpus_ids: Sequence[str], corpus_texts: Sequence[str]) -> None:
        import bm25s

        self._ids = corpus_ids
        # by id: a stable sort then settles ties
        self._order = np.argsort(np.array(corpus_ids, dtype=object), kind="stable")
        texts = [part_words(corpus_texts[position]) for position in self._order]
        tokens = bm25s.tokenize(texts, stopwords=STOP_WORDS, show_progress=False)
        self._index = bm25s.BM25()
        self._index.index(tokens, show_progress=False)
        self._place: dict[str, int] | None = None

    def search(
        self, queries: Sequence[str], k: int, wanted: Sequence[Sequence[str]] = ()
    ) -> tuple[list[list[str]], list[np.ndarray], list[list[float]]]:
        """The best k documents per query, and the scores of named documents.

        Documents that share no word with the query (score 0) are not results, so a row may be shorter than k or empty.

        Args:
            wanted: for each query the ids whose scores are returned too; none by default.

        Returns:
            ids [Q][<= k], one float32 array of scores per query, and the wanted scores.
        """
        import bm25s

        parted = [part_words(query) for query in queries]
        query_tokens = bm25s.tokenize(parted, stopwords=STOP_WORDS, return_ids=False, show_progress=False)
        if wanted and self._place is None:
            self._place = {self._ids[position]: place for place, position in enumerate(self._order)}
        ids, scores, wanted_scores = [], [], []
        for number, words in enumerate(query_tokens):
            known = self._index.get_tokens_ids(words)
            score_N = self._index.get_scores_from_ids(known) if len(known) else np.zeros(len(self._order), np.float32)
            hits = _best(score_N, k)
            ids.append([self._ids[self._order[hit]] for hit in hits])
            scores.append(score_N[hits])
            if wanted and self._place is not None:
                wanted_scores.append([float(score_N[self._place[key]]) for key in wanted[number]])
        return ids, scores, wanted_scores


def _best(score_N: np.ndarray, k: int) -> np.ndarray:
    hits = np.flatnonzero(score_N > 0)
    if len(hits) > k:
        kth = np.partition(score_N[hits], len(hits) - k)[len(hits) - k]
        hits = hits[score_N[hits] >= kth]
    return hits[np.argsort(-score_N[hits], kind="stable")][:k]


def index_bytes(documents: int, text_bytes: int) -> int:
    """Memory that building an index takes at its peak, the texts included.

    Measured from 100,000 to 300,000 texts of 230 and 1,150 characters: 8.3 to 9.1 and 7.6 bytes a character.
    """
    return 8 * text_bytes + 300 * documents


def check_memory(dataset: str, documents: int, text_bytes: int, free: int) -> None:
    """Refuse an index that `free` bytes do not hold, before the machine runs out of them.

    Raises:
        UserError: with what it would take.
    """
    need = index_bytes(documents, text_bytes)
    if need > free:
        raise UserError(
            f"BM25 over {dataset!r}: an index of {documents:,} documents takes about {need / 2**30:.1f} GiB in every "
            f"actor, here {free / 2**30:.1f} GiB can be had. Leave bm25 out of mine.more_retrievers for such a "
            "corpus, or use machines with more memory (fewer mine.encode.actors on each)."
        )


def search_bm25(
    corpus_ids: Sequence[str], corpus_texts: Sequence[str], queries: Sequence[str], k: int
) -> tuple[list[list[str]], list[np.ndarray]]:
    """The best k documents per query; ties by id, ascending. See `Bm25Index.search`.

    Returns:
        ids [Q][<= k] and one float32 array of scores per query.
    """
    ids, scores, _ = Bm25Index(corpus_ids, corpus_texts).search(queries, k)
    return ids, scores
