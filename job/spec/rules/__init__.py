"""Combinations that make no sense, found before anything is downloaded.

Each rule reads values by dotted key and yields what is wrong. A rule that meets a value that is
missing or invalid stops there: that value has a problem of its own to show.
"""

from collections.abc import Collection
from typing import Any

from job.spec.keys import Path
from job.spec.problems import Finding
from job.spec.rules import data, locations, training, weights
from job.spec.rules.view import Rule, Unread, View

RULES: tuple[Rule, ...] = (*locations.RULES, *data.RULES, *weights.RULES, *training.RULES)


def broken(values: Any, invalid: Collection[Path], options: Collection[Path] = ()) -> list[Finding]:
    """What every rule finds in `values`.

    Those at `invalid` are not to be relied on; those at `options` are the command line's.
    """
    found: list[Finding] = []
    at = View(values, invalid, options)
    for rule in RULES:
        try:
            found += rule(at)
        except Unread:
            continue
    return found
