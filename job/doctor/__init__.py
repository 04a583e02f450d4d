"""`job doctor`: whether this machine, its storage and its credentials can run a job.

A job checks things as it gets to them; the doctor checks all of them before any download.

Imports: spec, storage, distributed, artifacts, prep, families, engines, train, export, planning.
"""

from collections.abc import Iterator, Sequence

from job import redaction
from job.doctor import access, capacity, device, software
from job.doctor.check import Check
from job.doctor.subject import Subject
from job.errors import InputError, JobError
from job.spec.load import LoadedSpec

__all__ = ["Check", "exit_code", "run_checks", "text"]

MARKS = {"ok": "ok  ", "note": "    ", "warn": "warn", "fail": "FAIL"}


def run_checks(loaded: LoadedSpec | None = None) -> Iterator[Check]:
    """Runs every check of the machine and of what the spec names, in the order to show them.

    Raises what `sizes.measure` does if the model's configuration cannot be read.
    """
    subject = Subject.of(loaded)
    yield from software.checks(subject.spec)
    yield from device.checks(subject)
    yield from capacity.checks(subject)
    yield from access.checks(subject)


def exit_code(checks: Sequence[Check]) -> int:
    """0 if nothing failed; 12 if a retry cannot help; else 70.

    Missing or inaccessible inputs are the same on every machine, but another node may have the GPU
    that this one lacks.
    """
    codes = {check.exit_code for check in checks if check.state == "fail"}
    if not codes:
        return 0
    return InputError.exit_code if InputError.exit_code in codes else JobError.exit_code


def text(check: Check) -> str:
    """A check as text, with its fix on a second line."""
    line = f"{MARKS[check.state]}  {check.name:<16}{check.found}"
    return redaction.shown(line + (f"\n      fix: {check.fix}" if check.fix else ""))
