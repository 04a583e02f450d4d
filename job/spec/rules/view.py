"""How rules read the spec, and build findings."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

from job.spec import keys
from job.spec.foreign_names import nearest
from job.spec.keys import Json, Path
from job.spec.problems import Finding


class Unavailable(Exception):
    """A value that a rule reads is missing or invalid, so the rule cannot be checked."""


class View:
    """Read access to the values of a spec, defaults included: `at("train.seed")`."""

    def __init__(
        self, values: Json, invalid: Collection[Path], options: Collection[Path] = ()
    ) -> None:
        self._values, self._invalid, self._options = values, invalid, options

    def from_command_line(self, dotted: str) -> bool:
        """Whether the value was set on the command line, for this run only."""
        return keys.path_of(dotted) in self._options

    def __call__(self, dotted: str) -> Any:  # noqa: ANN401 - typed by the schema, key by key
        """The value of a key. Raises Unavailable if it is missing or invalid."""
        path = keys.path_of(dotted)
        if any(bad[: len(path)] == path or path[: len(bad)] == bad for bad in self._invalid):
            raise Unavailable
        value: Any = self._values
        for part in path:
            try:
                value = value[part]
            except (LookupError, TypeError):
                raise Unavailable from None
        return value

    def sources(self) -> Iterator[str]:
        """The dotted keys of the data sources in the spec."""
        data = self._values.get("data") if isinstance(self._values, dict) else None
        for name in ("train", "eval", "validation"):
            source = data.get(name) if isinstance(data, dict) else None
            if isinstance(source, dict):
                yield f"data.{name}"
            elif isinstance(source, list):
                yield from (f"data.{name}[{number}]" for number in range(len(source)))


Rule = Callable[[View], Iterator[Finding]]


def finding(dotted: str, message: str, fix: str) -> Finding:
    """A finding for the value of a dotted key."""
    return Finding(keys.path_of(dotted), message, fix)


def unknown_builtin(dotted: str, uri: str, known: tuple[str, ...]) -> Iterator[Finding]:
    """Yields a finding if a builtin:// URI is not one of `known`."""
    if uri not in known:
        close = nearest(uri, known) or known[0]
        yield finding(dotted, "does not ship with the project", f"write {close}")
