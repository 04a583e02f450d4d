"""What a rule sees of a spec, and how it says what is wrong."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

from job.spec.finding import Finding
from job.spec.keys import Path
from job.spec.names import nearest


class Unread(Exception):
    """A value that a rule asks for is missing or invalid."""


class View:
    """The values of a spec with defaults filled in, by dotted key."""

    def __init__(self, values: Any, invalid: Collection[Path]) -> None:
        self._values, self._invalid = values, invalid

    def __call__(self, dotted: str) -> Any:
        path = tuple(dotted.split("."))
        if any(bad[: len(path)] == path or path[: len(bad)] == bad for bad in self._invalid):
            raise Unread
        value = self._values
        for part in path:
            if not isinstance(value, dict) or part not in value:
                raise Unread
            value = value[part]
        return value

    def sources(self) -> Iterator[str]:
        """The dotted keys of the data sources that there are."""
        data = self._values.get("data") if isinstance(self._values, dict) else None
        for name in ("train", "eval"):
            if isinstance(data, dict) and isinstance(data.get(name), dict):
                yield f"data.{name}"


Rule = Callable[[View], Iterator[Finding]]


def find(dotted: str, message: str, fix: str) -> Finding:
    return Finding(tuple(dotted.split(".")), message, fix)


def builtin(dotted: str, uri: str, known: tuple[str, ...]) -> Iterator[Finding]:
    if uri not in known:
        close = nearest(uri, known) or known[0]
        yield find(dotted, "names nothing that ships with the project", f"write {close}")
