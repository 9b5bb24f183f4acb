"""Ray's object store as large as /dev/shm takes: left alone, Ray asks for up to 10 GB or 30 % of the memory."""

from __future__ import annotations

import re

SHARE = 0.9  # of /dev/shm; Ray keeps a little beside its store
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def quantity_bytes(text: str) -> int:
    """Bytes of "8Gi", "8G" (Kubernetes: 10^9) or "8g" (docker: 2^30).

    Raises:
        ValueError: something else.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kKmMgGtT]?)(i?)b?", text)
    if found is None:
        raise ValueError(f"{text!r} is no size; write 8Gi or 8g")
    number, unit, binary = found.groups()
    base = 1024 if binary or unit.islower() else 1000
    return int(float(number) * base ** _POWERS[unit.lower()])


def memory_bytes(text: str) -> float:
    """Bytes of a quantity of Kubernetes, whose small letters are thousandths: "16Gi", "1.5G", "1000m", "2Pi"."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([numkKMGTPE]?)(i?)", text)
    if found is None:
        raise ValueError(f"{text!r} is no quantity of Kubernetes")
    number, unit, binary = found.groups()
    power = {"n": -3, "u": -2, "m": -1, "": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}[unit]
    return float(number) * (1024 if binary else 1000) ** power


def object_store_bytes(shm: str) -> int:
    """Bytes of the object store for a /dev/shm of this size."""
    return int(SHARE * quantity_bytes(shm))
