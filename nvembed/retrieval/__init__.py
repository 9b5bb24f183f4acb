"""Encoding in actor pools, the vector cache, exact and approximate search, BM25."""
