"""Who may write: what a caller has made sure of right before each write, delete and part.

A guard is entered when everything slow is done: the bytes are beside their place on the disk, or
the request is about to be sent. Nothing here knows what the guard looks at.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Which requests a store refuses if the object is not what the request says it is.

    Such a request cannot reach an object that somebody else wrote in the meantime.
    """

    puts: bool = False
    completes: bool = False
    """Of uploads in parts."""
    deletes: bool = False


class Guard(Protocol):
    """What has to hold when something is written."""

    @property
    def conditions(self) -> Conditions:
        """What the store was seen to do with conditional requests."""
        ...

    def ensure(self) -> None:
        """Raises StorageError if nothing may be written: before a part that nobody sees yet."""
        ...

    def writing(self, uri: str, *, conditional: bool = False) -> AbstractContextManager[None]:
        """Within, `uri` is written or removed. Raises StorageError if it may not be.

        `conditional` says that the store itself refuses the request if the object has changed
        since before the guard was entered.
        """
        ...


class _Unguarded:
    """For what nobody else writes: this machine's own files."""

    conditions = Conditions()

    def ensure(self) -> None:
        pass

    @contextmanager
    def writing(self, uri: str, *, conditional: bool = False) -> Iterator[None]:
        yield


UNGUARDED: Guard = _Unguarded()
