"""Applies values from the command line (`--set a.b=c`) to a document before interpolation."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from job.errors import UsageError
from job.spec import keys
from job.spec.foreign_names import quoted
from job.spec.keys import Json, Path
from job.spec.parse import Document, SourceLocation, read_at
from job.spec.problems import Finding, json_path


@dataclass(frozen=True)
class KeyValue:
    """An override: a key and its value."""

    option: str | None
    """The command line option it came from, such as `--output`; None for `--set`."""
    key: str
    text: str
    """The value as YAML."""


Override = str | KeyValue
"""`KEY=VALUE` from `--set`, or the value of an option that stands for one key."""


def override(document: Document, overrides: Sequence[Override]) -> tuple[Document, list[Finding]]:
    """Returns a copy of `document` with `overrides` applied; the last one for a key wins.

    Overrides whose path cannot exist are returned as findings; validation checks the rest. Raises
    UsageError for one that is not `KEY=VALUE`.
    """
    values, locations = copy.deepcopy(document.values), dict(document.locations)
    findings = []
    for item in overrides:
        setting = _setting(item) if isinstance(item, str) else item
        path, text = keys.path_of(setting.key), setting.text
        try:
            value = _value(path, text)
            _put(values, path, value)
        except ValueError as error:
            shown = item if isinstance(item, str) else text
            findings.append(Finding(path, str(error), value=quoted(shown)))
            value = None
        for other in [p for p in locations if p[: len(path)] == path]:
            del locations[other]
        for depth in range(1, len(path)):
            locations.setdefault(path[:depth], SourceLocation(None))
        unquoted = text.strip()[:1] not in ("'", '"')
        locations[path] = SourceLocation(None, plain=unquoted, option=setting.option)
    return Document(document.origin, values, locations), findings


def with_output(overrides: Sequence[Override], output: str | None) -> list[Override]:
    """`overrides`, followed by one for `output.uri` if `output` is given."""
    return [*overrides, *([KeyValue("--output", "output.uri", output)] if output else [])]


def _setting(item: str) -> KeyValue:
    key, equals, text = item.partition("=")
    if not equals:
        raise UsageError(
            "--set", "must be KEY=VALUE", value=item, fix="write --set train.max_steps=5"
        )
    return KeyValue(None, key.strip().removeprefix("$."), text)


def _value(path: Path, text: str) -> Json:
    try:
        return read_at(path, text)
    except ValueError as error:
        raise ValueError(f"value {error}") from None


def _put(values: dict[str, Any], path: Path, value: Json) -> None:
    """Sets the value. Raises ValueError if `path` is invalid or leads through a scalar."""
    if "" in path or len(path) > 8:
        raise ValueError("requires a dotted key such as train.max_steps")
    target: Any = values
    for depth, part in enumerate(path):
        above = json_path(path[:depth]).removeprefix("$.")
        if isinstance(part, int):
            if not isinstance(target, list) or part >= len(target):
                held = f"a list of {len(target)}" if isinstance(target, list) else quoted(target)
                raise ValueError(f"has no item {part} in {above}, which is {held}")
        elif isinstance(target, list) and part.isdecimal():
            item = json_path((*path[:depth], int(part), *path[depth + 1 :])).removeprefix("$.")
            raise ValueError(f"must name an item of the list in brackets, as in {item}")
        elif isinstance(target, list) and all(isinstance(item, dict) for item in target):
            raise ValueError(f"must name an item of the list, as in {above}[0].{part}")
        elif not isinstance(target, dict):
            raise ValueError(f"has no keys in {above}, which is {quoted(target)}")
        if depth == len(path) - 1:
            target[part] = value
        elif isinstance(part, str) and target.get(part) is None:
            target[part] = {}
        target = target[part]
