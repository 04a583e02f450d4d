"""Permission to write, checked right before each write, delete and part.

A guard is entered once everything slow is done: the bytes are on the target disk, or the request
is about to be sent. What a guard checks is the caller's business.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Which requests a store refuses if the object no longer has the version that they name.

    Such a request cannot touch an object that another process wrote in the meantime.
    """

    puts: bool = False
    completes: bool = False
    """Of multipart uploads."""
    deletes: bool = False


class Guard(Protocol):
    """A condition for writing."""

    @property
    def conditions(self) -> Conditions:
        """Which conditional requests the store honors."""
        ...

    def ensure(self) -> None:
        """Raises StorageError if nothing may be written; for parts that are not visible yet."""
        ...

    def writing(self, uri: str, *, conditional: bool = False) -> AbstractContextManager[None]:
        """Wraps the write or removal of `uri`. Raises StorageError if it is not allowed.

        `conditional`: the store itself refuses the request if the object has changed since before
        the guard was entered.
        """
        ...


class _Unguarded:
    """For files that only this process writes."""

    conditions = Conditions()

    def ensure(self) -> None:
        pass

    @contextmanager
    def writing(self, uri: str, *, conditional: bool = False) -> Iterator[None]:
        yield


UNGUARDED: Guard = _Unguarded()
