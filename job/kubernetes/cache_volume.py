"""The PersistentVolumeClaim of the cache: its name and size.

A claim's request can grow but not shrink, so a size derived from the model would make `kubectl
apply` fail once the model shrinks. Sizes are therefore classes, and the class that a job needs is
part of its claim's name: a job of another class gets another claim. `--cache-size` grows the claim
of a job, or says that it has been grown.
"""

import re
from dataclasses import dataclass

from job.errors import UsageError
from job.kubernetes.resources import quantity
from job.planning.sizes import GIB

CLASSES = tuple(GIB * count for count in (10, 20, 50, 100, 200, 500, 1024, 2048, 5120))
"""The sizes of claims in bytes; beyond them, multiples of the largest."""

_SIZE = re.compile(r"([1-9]\d{0,4})(Gi|Ti)")
_CLAIM = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


@dataclass(frozen=True, kw_only=True)
class CacheVolume:
    claim: str
    """The claim's name."""
    size: int | None
    """What it requests, in bytes; None for a claim that exists, which no manifest contains."""
    is_shared: bool
    """Whether several nodes mount it."""


def of_job(
    name: str, needed: int, *, nodes: int, size: str | None = None, claim: str | None = None
) -> CacheVolume:
    """The cache of a job that needs this many bytes: an own `claim`, or one of `size`.

    Raises UsageError for options that are malformed or contradict each other, and for a size below
    the class that the job needs.
    """
    shared = nodes > 1
    if claim is not None:
        if size is not None:
            raise UsageError(
                "--cache-size", "conflicts with --cache-claim", value=size, fix="remove one of them"
            )
        if not _CLAIM.fullmatch(claim):
            raise UsageError(
                "--cache-claim", "must be the name of a PersistentVolumeClaim", value=claim
            )
        return CacheVolume(claim=claim, size=None, is_shared=shared)
    smallest = size_class(needed)
    # Access modes cannot be changed either.
    suffix = "-shared" if shared else ""
    return CacheVolume(
        claim=f"{name}-cache-{quantity(smallest).lower()}{suffix}",
        size=smallest if size is None else _parsed(size, smallest),
        is_shared=shared,
    )


def size_class(needed: int) -> int:
    """The smallest class that holds this many bytes."""
    largest = CLASSES[-1]
    fitting = (each for each in CLASSES if each >= needed)
    return next(fitting, -(-needed // largest) * largest)


def _parsed(text: str, smallest: int) -> int:
    found = _SIZE.fullmatch(text)
    if found is None:
        raise UsageError(
            "--cache-size", "must be a whole number of Gi or Ti", value=text, fix="200Gi"
        )
    count = int(found[1]) * GIB * (1024 if found[2] == "Ti" else 1)
    if count < smallest:
        raise UsageError(
            "--cache-size",
            f"is less than the volume that the job needs, {quantity(smallest)}",
            value=text,
            fix="omit it, or name a larger one",
        )
    return count
