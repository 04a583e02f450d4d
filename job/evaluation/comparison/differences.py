"""Settings, inputs, versions and machines that differ between runs."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from job.evaluation.comparison.stored_run import StoredRun
from job.spec import keys

_WHERE = (
    *("name", "output.uri", "runtime.workdir", "runtime.cache_dir", "runtime.cache_limit"),
    *("runtime.metrics_file", "runtime.metrics_port", "train.logging_dir"),
)
"""Settings of where a run took place, which says nothing about its results."""


class Absent:
    """A key or value that a run does not have."""

    def __repr__(self) -> str:
        return "–"


ABSENT: Final = Absent()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A key with its value in each run."""

    key: str
    values: tuple[object, ...]
    """`ABSENT` for a run that does not have the key."""


@dataclass(frozen=True, kw_only=True)
class Differences:
    settings: tuple[Difference, ...]
    inputs: tuple[Difference, ...]
    versions: tuple[Difference, ...]
    machines: tuple[Difference, ...]
    newer_keys: int
    """Settings that only some runs know, because they are newer, all at their defaults."""


def differences(runs: Sequence[StoredRun]) -> Differences:
    """What differs; a run without a readable spec counts for no setting."""
    known = [run.settings for run in runs if run.settings]
    settings, newer = [], 0
    for each in _differing(runs, lambda run: run.settings):
        if each.key in _WHERE:
            continue
        values = [values[each.key] for values in known if each.key in values]
        if len(values) < len(known) and all(_is_default(each.key, value) for value in values):
            newer += not all(_knows(values, each.key) for values in known)
        elif len(values) < len(known) or any(value != values[0] for value in values):
            settings.append(each)
    return Differences(
        settings=tuple(settings),
        inputs=tuple(_differing(runs, _inputs)),
        versions=tuple(_differing(runs, lambda run: run.versions)),
        machines=tuple(_differing(runs, lambda run: run.machine)),
        newer_keys=newer,
    )


def _differing(
    runs: Sequence[StoredRun], values_of: Callable[[StoredRun], Mapping[str, object]]
) -> Iterable[Difference]:
    """The keys whose values differ, in the order of the first run that has them."""
    tables = [values_of(run) for run in runs]
    for key in dict.fromkeys(key for table in tables for key in table):
        values = tuple(table.get(key, ABSENT) for table in tables)
        if any(value != values[0] for value in values):
            yield Difference(key=key, values=values)


def _inputs(run: StoredRun) -> Mapping[str, object]:
    """The inputs' digests, so that changed content under one URI shows."""
    return {
        name: f"{each.get('uri')} ({str(each.get('digest'))[:12]})"
        for name, each in run.inputs.items()
    }


def _knows(settings: Mapping[str, object], key: str) -> bool:
    """Whether the run's version has the key, if only where it is not null and not a short list."""
    first = re.sub(r"\[\d+\]", "[0]", key)
    if first in settings or any(name.startswith((f"{key}.", f"{key}[")) for name in settings):
        return True
    parts = key.split(".")
    return any(".".join(parts[:n]) in settings for n in range(1, len(parts)))


def _is_default(dotted: str, value: object) -> bool:
    node = keys.at(keys.path_of(dotted))
    if node is None:  # a key of another version: null is what unset keys have
        return value is None
    return "default" in node and node["default"] == value
