"""The result of one check."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from job.errors import InputError, JobError

State = Literal["ok", "note", "warn", "fail"]


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    state: State
    """`note` only informs; a `warn` may fail a run later, a `fail` will."""
    found: str
    fix: str = ""
    exit_code: int = JobError.exit_code
    """Of a `fail`."""


def ok(name: str, found: str) -> Check:
    return Check(name=name, state="ok", found=found)


def note(name: str, found: str) -> Check:
    return Check(name=name, state="note", found=found)


def warn(name: str, found: str, fix: str) -> Check:
    return Check(name=name, state="warn", found=found, fix=fix)


def fail(name: str, found: str, fix: str) -> Check:
    """A fault of this machine, or a temporary one."""
    return Check(name=name, state="fail", found=found, fix=fix)


def attempt(name: str, look: Callable[[], str]) -> Check:
    """`ok` with what `look` returns, or the failure that it raises."""
    try:
        return ok(name, look())
    except JobError as error:
        return failed(name, error)


def failed(name: str, error: JobError) -> Check:
    """The check that raised `error`; its exit code is 12 if a retry cannot help."""
    problem = error.problems[0]
    return Check(
        name=name,
        state="fail",
        found=f"{problem.field}: {problem.message}",
        fix=problem.fix or "",
        exit_code=InputError.exit_code if error.retry == "never" else JobError.exit_code,
    )
