"""`job doctor`: whether this machine, with its storage and accounts, can run a job.

A job's own checks come as it reaches them; these come before anything is downloaded, all at once.

Imports: spec, storage, artifacts, prep, families, engines, train, export, planning.
"""

from collections.abc import Iterator, Sequence

from job import redaction
from job.doctor import access, capacity, device, software
from job.doctor.check import Check
from job.doctor.subject import Subject
from job.errors import InputError, JobError
from job.spec.load import LoadedSpec

__all__ = ["Check", "doctor", "exit_code", "screen"]

MARKS = {"ok": "ok  ", "note": "    ", "warn": "warn", "fail": "FAIL"}


def doctor(loaded: LoadedSpec | None = None) -> Iterator[Check]:
    """Every check of the machine, and those of what the spec names, in the order of a screen.

    Raises what `sizes.measure` does where the spec's model has no readable configuration.
    """
    subject = Subject.of(loaded)
    yield from software.checks(subject.spec)
    yield from device.checks(subject)
    yield from capacity.checks(subject)
    yield from access.checks(subject)


def exit_code(checks: Sequence[Check]) -> int:
    """0 where nothing failed; 12 where another try would find the same; else 70.

    What is denied or missing is so everywhere. Another node may have the GPU that this one lacks.
    """
    codes = {check.exit_code for check in checks if check.state == "fail"}
    if not codes:
        return 0
    lasting = InputError.exit_code
    return lasting if lasting in codes else JobError.exit_code


def screen(check: Check) -> str:
    """The lines of one check."""
    line = f"{MARKS[check.state]}  {check.name:<14}{check.found}"
    return redaction.shown(line + (f"\n      fix: {check.fix}" if check.fix else ""))
