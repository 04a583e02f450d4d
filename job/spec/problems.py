"""Findings: problems of a spec by path, and where each path was set."""

import re
from dataclasses import dataclass

from job.spec.foreign_names import quoted
from job.spec.keys import Path
from job.spec.parse import Document, SourceLocation


@dataclass(frozen=True)
class Finding:
    """A problem with the value at `path`."""

    path: Path
    message: str
    fix: str | None = None
    value: str | None = None
    """The value to quote, if it is not the one at `path`."""


def json_path(path: Path) -> str:
    """`path` in JSONPath notation: `$.eval.metrics[0]`."""
    shown = "$"
    for part in path:
        if isinstance(part, int):
            shown += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_]\w*", part, re.ASCII):
            shown += f".{part}"
        else:
            shown += f'["{quoted(part)}"]'
    return shown


def location_of(document: Document, path: Path) -> SourceLocation | None:
    """Where `path` or its nearest ancestor was set; None for the root."""
    for end in range(len(path), 0, -1):
        if location := document.locations.get(path[:end]):
            return location
    return None


def locate(document: Document, path: Path) -> str:
    """Names `path` and where it was set: `specs/latex.yaml:12 $.train.seed`, `--set $.train.seed`.

    A value from an option such as `--output` is named by the option alone, since its user need not
    know the key.
    """
    location = location_of(document, path)
    if location and location.line is None:
        return location.option or f"--set {json_path(path)}"
    return f"{document.origin}{f':{location.line}' if location else ''} {json_path(path)}"
