"""The process's heap, given back to the system (layer 0): glibc keeps freed pieces that later fit nothing."""

from __future__ import annotations

import ctypes
import gc


def trim() -> None:
    """Return freed pages to the system; nothing where the C library is not glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def give_back() -> None:
    """Collect garbage, then `trim` (395 MiB after the quickstart's `initialise`)."""
    gc.collect()
    trim()
