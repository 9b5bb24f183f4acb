"""Word shingles as plain sets of strings: the reference that hashed ones are held against."""

from nvembed.text.identity import words_of


def shingles(text: str, words: int) -> frozenset[bytes]:
    """Runs of `words` consecutive words, as UTF-8; a shorter text is one shingle."""
    tokens = words_of(text)
    starts = range(max(len(tokens) - words + 1, 1))
    return frozenset(" ".join(tokens[start : start + words]).encode("utf-8", "surrogatepass") for start in starts)
