"""Formats quantities: readable as text, numbers in JSON."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """A field of the log, with a text for people and numbers for JSON."""

    text: str
    numbers: Mapping[str, float | None]
    """By suffix of the JSON key: `_bytes` makes `memory` `memory_bytes`."""

    def __str__(self) -> str:
        return self.text


def fraction(done: int, total: int | None) -> Quantity:
    """Logged as `step=3/40`; in JSON as `step` and `step_total`."""
    return Quantity(str(done) if total is None else f"{done}/{total}", {"": done, "_total": total})


def byte_count(count: float) -> Quantity:
    """Logged as `memory=3.4 MiB`; in JSON as `memory_bytes`."""
    return Quantity(size(count), {"_bytes": int(count)})


def seconds(count: float) -> Quantity:
    """Logged as `left=3m20s`; in JSON as `left_seconds`."""
    return Quantity(duration(count), {"_seconds": round(count, 3)})


def number(value: float, digits: int = 4) -> str:
    """Formats a number: `0.1235`, `195,900`."""
    if 999.5 <= abs(value) < math.inf:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Formats seconds: `8.2s`, `3m20s`, `2h05m`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    if seconds < 3600:
        return f"{int(seconds // 60)}m{int(seconds % 60):02d}s"
    return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"


def size(count: float) -> str:
    """Formats bytes: `812 B`, `3.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
