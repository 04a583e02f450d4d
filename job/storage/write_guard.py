"""Write guards: a check by the caller right before each write, delete and upload of a part.

A guard is entered once everything slow is done: the bytes are on the target disk, or the request
is about to be sent.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The conditional requests that a store supports (`If-Match`, `If-None-Match`).

    Such a request cannot change an object that another process wrote in the meantime.
    """

    puts: bool = False
    completes: bool = False
    """Whether completing a multipart upload can be conditional."""
    deletes: bool = False


class Guard(Protocol):
    """Decides whether a write is still allowed."""

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
