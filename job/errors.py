"""The errors that a user can meet, each with its exit code.

Every error names what is wrong (`field` and `value`), why (`message`) and what to do (`fix`).
Anything that is not a `JobError` is a defect of this project and ends with exit code 70.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from job.redaction import printable, redact

OK, USAGE, INTERNAL, STOPPED = 0, 2, 70, 143

Retry = Literal["never", "counted", "free"]
RETRIES: tuple[Retry, ...] = ("never", "counted", "free")


@dataclass(frozen=True)
class Problem:
    """One thing wrong: where it is, what is there, why it is wrong and how to mend it."""

    field: str
    """Where: a JSON path (`$.train.learning_rate`), a URI, or a row (`train.jsonl:12`)."""
    message: str
    """Why it is wrong, in a few words that follow the field: `must be greater than 0`."""
    value: str | None = None
    """What was found there, as the user wrote it; None where there is nothing to show."""
    fix: str | None = None
    """What to do about it, as an instruction."""
    key: str | None = None
    """The key of the spec that it is about, which the reference explains."""

    def __str__(self) -> str:
        found = f" (found {_shorten(self.value)})" if self.value is not None else ""
        fix = f"\n    fix: {self.fix}" if self.fix else ""
        see = f"\n    see: python -m job reference {self.key}" if self.key else ""
        return f"{self.field}: {self.message}{found}{fix}{see}"


class ReportedError(BaseException):
    """What ends the job with an exit code of its own and one or more problems to show."""

    exit_code = INTERNAL
    title = "internal error"
    retry: Retry = "counted"
    """What a scheduler may do: another try is pointless, costs one of few, or costs nothing."""

    def __init__(
        self,
        field: str,
        message: str,
        *,
        value: object = None,
        fix: str | None = None,
    ) -> None:
        shown = None if value is None else str(value)
        key = field.removeprefix("$.") if field.startswith("$.") else None
        self.problems: tuple[Problem, ...] = (_clean(Problem(field, message, shown, fix, key)),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> Self:
        """One error that reports every problem found, in the order found."""
        assert problems, "an error needs at least one problem"
        error = cls.__new__(cls)
        error.problems = tuple(map(_clean, problems))
        BaseException.__init__(error, str(error))
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross from worker processes whole; pickle alone would pass the text only."""
        return type(self).from_problems, (self.problems,)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class JobError(ReportedError, Exception):
    """An error that the user can mend, or a defect of this project."""


class UsageError(JobError):
    """The command line makes no sense."""

    exit_code = USAGE
    title = "usage"
    retry = "never"


class SpecError(JobError):
    """The spec is invalid."""

    exit_code = 10
    title = "invalid spec"
    retry = "never"


class DataError(JobError):
    """The data is invalid: too many bad rows, no rows, no trained token."""

    exit_code = 11
    title = "invalid data"
    retry = "never"


class InputError(JobError):
    """An input is missing, or access to it is denied."""

    exit_code = 12
    title = "input unavailable"
    retry = "never"


class MissingInputError(InputError):
    """Nothing is there: the one case in which work may go on without what was looked for.

    What may not be read is another matter. Who takes it for missing makes anew, or removes, what
    is stored.
    """


class OutOfMemoryError(JobError):
    """The work does not fit into the machine's memory."""

    exit_code = 20
    title = "out of memory"
    retry = "never"


class StorageError(JobError):
    """Storage failed after retries."""

    exit_code = 21
    title = "storage failed"


class ProofError(JobError):
    """What was exported is not what was trained."""

    exit_code = 30
    title = "export proof failed"
    retry = "never"


class Stopped(ReportedError):
    """SIGTERM arrived; what could be kept was stored.

    No `Exception`: libraries catch those at places where a signal finds them.
    """

    exit_code = STOPPED
    title = "stopped"
    retry = "free"

    def tell_kept(self, what: str, command: str) -> None:
        """Says what is kept and how to go on, in place of general advice."""
        told = (replace(problem, fix=None) for problem in self.problems)
        self.problems = (*told, _clean(Problem("kept", what, fix=f"go on with {command}")))


_FULL = (errno.ENOSPC, errno.EDQUOT)


def reported(error: BaseException) -> ReportedError:
    """The error itself where it is one to tell, else one for what a library raised, its cause."""
    if isinstance(error, ReportedError):
        return error
    message = f"{type(error).__name__}: {error}"
    found: JobError
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        found = OutOfMemoryError(
            "memory",
            message,
            fix="lower train.per_device_train_batch_size, train.per_device_eval_batch_size or "
            "data.max_pixels, or turn on train.gradient_checkpointing",
        )
    elif is_full(error):
        found = full(error, "disk")
    elif isinstance(error, ModuleNotFoundError) and not (error.name or "job").startswith("job"):
        found = JobError(
            "python", f"has no package {error.name}", fix="make setup, or rebuild the image"
        )
    else:
        found = JobError("job", message, fix="run again with --debug and report the traceback")
    found.__cause__ = error
    return found


def is_full(error: BaseException) -> bool:
    """Whether a disk is full, or a quota used up: safetensors and Arrow say it in words only."""
    number = getattr(error, "errno", None)
    return number in _FULL or any(os.strerror(each) in str(error) for each in _FULL)


def full(error: BaseException, place: object) -> StorageError:
    """The error for a full disk: the file that `error` names, else what is on that disk."""
    return StorageError(
        str(getattr(error, "filename", None) or place),
        f"no space is left there: {type(error).__name__}: {error}",
        fix="free some space there (python -m job clean), or set runtime.workdir to a folder on a "
        "larger volume",
    )


def _clean(problem: Problem) -> Problem:
    """Without secrets from the start: whole, before a message is cut, and wherever it goes."""

    def clean(text: str) -> str:
        return printable(redact(text), keep="\n\t")

    return Problem(
        field=clean(problem.field),
        message=clean(problem.message),
        value=problem.value and clean(problem.value),
        fix=problem.fix and clean(problem.fix),
        key=problem.key and clean(problem.key),
    )


def _shorten(value: str, limit: int = 160) -> str:
    """The value on one line, cut in the middle where it is longer than `limit` characters."""
    line = " ".join(value.split()) or repr(value)
    return line if len(line) <= limit else f"{line[: limit - 30]} … {line[-25:]}"


def exit_codes(retry: Retry) -> list[int]:
    """The exit codes of the failures that are to be tried again so."""
    kinds = {*ReportedError.__subclasses__(), *JobError.__subclasses__()}
    return sorted({kind.exit_code for kind in kinds if kind.retry == retry})
