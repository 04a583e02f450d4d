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
    """`note` is information; `warn` may make a run fail, `fail` will."""
    found: str
    fix: str = ""
    exit_code: int = JobError.exit_code
    """The exit code of a `fail`."""


def ok(name: str, found: str) -> Check:
    return Check(name=name, state="ok", found=found)


def note(name: str, found: str) -> Check:
    return Check(name=name, state="note", found=found)


def warn(name: str, found: str, fix: str) -> Check:
    return Check(name=name, state="warn", found=found, fix=fix)


def fail(name: str, found: str, fix: str) -> Check:
    """A failure that a retry, perhaps on another machine, may solve."""
    return Check(name=name, state="fail", found=found, fix=fix)


def attempt(name: str, probe: Callable[[], str]) -> Check:
    """Runs a check: `ok` with the text that `probe` returns, or the failure that it raises."""
    try:
        return ok(name, probe())
    except JobError as error:
        return failed(name, error)


def failed(name: str, error: JobError) -> Check:
    """A `fail` for `error`, with exit code 12 if a retry cannot help."""
    problem = error.problems[0]
    return Check(
        name=name,
        state="fail",
        found=f"{problem.field}: {problem.message}",
        fix=problem.fix or "",
        exit_code=InputError.exit_code if error.retry == "never" else JobError.exit_code,
    )
