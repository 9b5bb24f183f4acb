"""Large numbers for people."""

from nvembed.plan.memory import GIB


def flops_text(flops: float) -> str:
    """Operations for people: `42.3 TFLOP`, `365.3 EFLOP`."""
    for name in ("G", "T", "P", "E", "Z"):
        flops /= 1e9 if name == "G" else 1e3
        if flops < 1000:
            break
    return f"{flops:,.1f} {name}FLOP"


def size_text(size: float) -> str:
    """Bytes for people: `4.2 MiB`, `1.4 TiB`."""
    for name, unit in (("PiB", GIB * 2**20), ("TiB", GIB * 2**10), ("GiB", GIB)):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 2**20:,.1f} MiB"


def time_text(seconds: float) -> str:
    """Seconds for people: `7.5 h`, `5:17`, `25 s`."""
    if seconds >= 7_200:
        return f"{seconds / 3600:,.1f} h"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"
