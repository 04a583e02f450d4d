"""Quantities as people read them, and as numbers in JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """A value with a text for people and numbers for JSON."""

    text: str
    numbers: Mapping[str, float | None]
    """By the suffix of the field's name."""

    def __str__(self) -> str:
        return self.text


def of(done: int, total: int | None) -> Quantity:
    """`3/40`; in JSON `step` and `step_total`."""
    return Quantity(str(done) if total is None else f"{done}/{total}", {"": done, "_total": total})


def amount(count: float) -> Quantity:
    """`3.4 MiB`; in JSON `memory_bytes`."""
    return Quantity(size(count), {"_bytes": int(count)})


def span(seconds: float) -> Quantity:
    """`3m20s`; in JSON `left_seconds`."""
    return Quantity(duration(seconds), {"_seconds": round(seconds, 3)})


def number(value: float, digits: int = 4) -> str:
    """A number as people read it: `0.1235`, `195,900`."""
    if 999.5 <= abs(value) < math.inf:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Seconds as people read them: `8.2s`, `3m20s`, `2h05m`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    if seconds < 3600:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"


def size(count: float) -> str:
    """Bytes as people read them: `812 B`, `3.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
