"""Checks of values against each other, before anything is downloaded.

Each rule reads values by dotted key and yields findings. A rule is skipped if a value that it reads
is missing or invalid, since that is reported already.
"""

from collections.abc import Collection

from job.spec.keys import Json, Path
from job.spec.problems import Finding
from job.spec.rules import (
    adapters,
    data,
    four_bit,
    hub,
    locations,
    reinforcement,
    training,
    validation,
    weights,
)
from job.spec.rules.view import Rule, Unavailable, View

RULES: tuple[Rule, ...] = (
    *locations.RULES,
    *data.RULES,
    *weights.RULES,
    *adapters.RULES,
    *four_bit.RULES,
    *training.RULES,
    *validation.RULES,
    *reinforcement.RULES,
    *hub.RULES,
)


def check(values: Json, invalid: Collection[Path], options: Collection[Path] = ()) -> list[Finding]:
    """The findings of all rules in `values`.

    Values at the paths in `invalid` are reported already; those in `options` came from the command
    line.
    """
    findings: list[Finding] = []
    at = View(values, invalid, options)
    for rule in RULES:
        try:
            findings += rule(at)
        except Unavailable:
            continue
    return findings
