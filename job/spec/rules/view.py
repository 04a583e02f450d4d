"""What a rule sees of a spec, and how it says what is wrong."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

from job.spec import keys
from job.spec.foreign_names import nearest
from job.spec.keys import Path
from job.spec.problems import Finding


class Unread(Exception):
    """A value that a rule asks for is missing or invalid."""


class View:
    """The values of a spec with defaults filled in, by dotted key."""

    def __init__(
        self, values: Any, invalid: Collection[Path], options: Collection[Path] = ()
    ) -> None:
        self._values, self._invalid, self._options = values, invalid, options

    def by_option(self, dotted: str) -> bool:
        """Whether the command line gives the value, for this one run of the spec."""
        return keys.path_of(dotted) in self._options

    def __call__(self, dotted: str) -> Any:
        path = keys.path_of(dotted)
        if any(bad[: len(path)] == path or path[: len(bad)] == bad for bad in self._invalid):
            raise Unread
        value = self._values
        for part in path:
            try:
                value = value[part]
            except (LookupError, TypeError):
                raise Unread from None
        return value

    def sources(self) -> Iterator[str]:
        """The dotted keys of the data sources that there are."""
        data = self._values.get("data") if isinstance(self._values, dict) else None
        for name in ("train", "eval"):
            source = data.get(name) if isinstance(data, dict) else None
            if isinstance(source, dict):
                yield f"data.{name}"
            elif isinstance(source, list):
                yield from (f"data.{name}[{number}]" for number in range(len(source)))


Rule = Callable[[View], Iterator[Finding]]


def find(dotted: str, message: str, fix: str) -> Finding:
    return Finding(keys.path_of(dotted), message, fix)


def builtin(dotted: str, uri: str, known: tuple[str, ...]) -> Iterator[Finding]:
    if uri not in known:
        close = nearest(uri, known) or known[0]
        yield find(dotted, "names nothing that ships with the project", f"write {close}")
