"""The PersistentVolumeClaim of the cache: its name and size.

A claim's request can grow but not shrink, so a size derived from the model would make `kubectl
apply` fail once the model shrinks. Sizes are therefore classes, and the class that a job needs is
part of its claim's name: a job of another class gets another claim. `--cache-size` grows the claim
of a job, or says that it has been grown. Access modes and storage classes cannot be changed at all,
and are part of the name too.
"""

import re
from dataclasses import dataclass

from job.errors import UsageError
from job.kubernetes.resources import quantity
from job.planning.sizes import GIB

CLASSES = tuple(GIB * count for count in (10, 20, 50, 100, 200, 500, 1024, 2048, 5120))
"""The sizes of claims in bytes; beyond them, multiples of the largest."""

MAX_NAME = 253
"""Characters of an object's name."""

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
    name: str,
    needed: int,
    *,
    nodes: int,
    size: str | None = None,
    claim: str | None = None,
    storage_class: str | None = None,
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
    return CacheVolume(
        claim=claim_name(f"{name}-cache", smallest, shared=shared, storage_class=storage_class),
        size=smallest if size is None else _parsed(size, smallest),
        is_shared=shared,
    )


def claim_name(prefix: str, size: int, *, shared: bool, storage_class: str | None) -> str:
    """The name of a claim, with all that cannot be changed in one that exists.

    Raises UsageError if the storage class makes it too long.
    """
    parts = (prefix, quantity(size).lower(), "shared" if shared else None, storage_class)
    name = "-".join(part for part in parts if part)
    if len(name) > MAX_NAME:
        raise UsageError(
            "--storage-class",
            f"makes a claim's name longer than {MAX_NAME} characters",
            value=storage_class,
            fix="--cache-claim, with a claim of this class that you create",
        )
    return name


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
