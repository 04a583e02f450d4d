"""Writes a benchmark's result with its device, command, versions and date."""

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from job.artifacts.provenance import source_revision

RESULTS = Path(__file__).parent / "results"


def write(
    name: str,
    module: str,
    device: str,
    measured: Mapping[str, Any],
    packages: Sequence[str],
    results: Path = RESULTS,
) -> None:
    """Writes `NAME.json`: the measurements, then the command, versions and date."""
    record = {
        "name": name,
        "device": device,
        **measured,
        "command": shlex.join(["python", "-m", module, *_arguments(sys.argv[1:])]),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "source_revision": source_revision(),
    }
    results.mkdir(parents=True, exist_ok=True)  # a missing folder must not lose the result
    (results / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def _arguments(given: Sequence[str]) -> list[str]:
    """Those that say what was measured: without the folder that the result is written to."""
    if "--results" not in given:
        return list(given)
    at = given.index("--results")
    return [*given[:at], *given[at + 2 :]]
