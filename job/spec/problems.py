"""A problem at a path, before it is known which line or option that path came from."""

import re
from dataclasses import dataclass

from job.spec.foreign_names import quoted
from job.spec.keys import Path
from job.spec.parse import Document, SourceLocation


@dataclass(frozen=True)
class Finding:
    """One thing wrong with the value at `path`."""

    path: Path
    message: str
    fix: str | None = None
    value: str | None = None
    """What was found, where that is not simply the value at `path`."""


def json_path(path: Path) -> str:
    """`path` as people write it: `$.eval.metrics[0]`."""
    shown = "$"
    for part in path:
        if isinstance(part, int):
            shown += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_]\w*", part, re.ASCII):
            shown += f".{part}"
        else:
            shown += f'["{quoted(part)}"]'
    return shown


def place_of(document: Document, path: Path) -> SourceLocation | None:
    """Where `path`, or the nearest thing above it, was written; None where that is the root."""
    for end in range(len(path), 0, -1):
        if place := document.places.get(path[:end]):
            return place
    return None


def locate(document: Document, path: Path) -> str:
    """`path` with its source: `specs/latex.yaml:12 $.train.seed`, or `--set $.train.seed`.

    Of what an option of its own sets, the option: its user need not know the key.
    """
    place = place_of(document, path)
    if place and place.line is None:
        return place.option or f"--set {json_path(path)}"
    return f"{document.origin}{f':{place.line}' if place else ''} {json_path(path)}"
