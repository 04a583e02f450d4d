"""The errors that the job reports to users, each with its exit code.

Every error names what is wrong (`field` and `value`), why (`message`) and what to do (`fix`). Any
other exception is a bug in this project and exits with 70.
"""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from job.redaction import printable, redact

OK, USAGE, INTERNAL, STOPPED = 0, 2, 70, 143

Retry = Literal["never", "counted", "free"]
RETRIES: tuple[Retry, ...] = ("never", "counted", "free")


@dataclass(frozen=True)
class Problem:
    """One problem: where it is, the value found there, why it is wrong, and how to fix it."""

    field: str
    """Where: a JSON path (`$.train.learning_rate`), a URI, or a row (`train.jsonl:12`)."""
    message: str
    """Why it is wrong, phrased to follow the field: `must be greater than 0`."""
    value: str | None = None
    """The value, as the user wrote it; None if there is none to show."""
    fix: str | None = None
    """What to do about it, in the imperative."""
    key: str | None = None
    """The spec key to look up in the reference."""

    def __str__(self) -> str:
        found = f" (found {_shorten(self.value)})" if self.value is not None else ""
        fix = f"\n    fix: {self.fix}" if self.fix else ""
        see = f"\n    see: python -m job reference {self.key}" if self.key else ""
        return f"{self.field}: {self.message}{found}{fix}{see}"


class ReportedError(BaseException):
    """Ends the job with an exit code and one or more problems to report."""

    exit_code = INTERNAL
    title = "internal error"
    retry: Retry = "counted"
    """Whether a scheduler may retry: `never`, `counted` against its limit, or `free`."""

    def __init__(
        self,
        field: str,
        message: str,
        *,
        value: object = None,
        fix: str | None = None,
    ) -> None:
        shown = None if value is None else str(value)
        key = re.sub(r"\[\d+\]", "", field.removeprefix("$.")) if field.startswith("$.") else None
        self.problems: tuple[Problem, ...] = (_clean(Problem(field, message, shown, fix, key)),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> Self:
        """One error that reports all problems, in order."""
        assert problems, "an error needs at least one problem"
        error = cls.__new__(cls)
        error.problems = tuple(map(_clean, problems))
        BaseException.__init__(error, str(error))
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the problems, so that they survive between processes; the default drops them."""
        return type(self).from_problems, (self.problems,)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class JobError(ReportedError, Exception):
    """An error that the user can fix, or a bug in this project."""


class UsageError(JobError):
    """The command line is invalid."""

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
    """The input does not exist. Callers that can do without it catch only this.

    Denied access must not be treated as missing: stored files would be overwritten or removed.
    """


class OutOfMemoryError(JobError):
    """The job does not fit into the memory of the machine or device."""

    exit_code = 20
    title = "out of memory"
    retry = "never"


class StorageError(JobError):
    """Storage failed after retries."""

    exit_code = 21
    title = "storage failed"


class ProofError(JobError):
    """The exported model differs from the trained one."""

    exit_code = 30
    title = "export proof failed"
    retry = "never"


class Stopped(ReportedError):
    """A signal asked the job to stop; progress is saved as far as possible.

    Not an `Exception`, because libraries interrupted by the signal would catch it.
    """

    exit_code = STOPPED
    title = "stopped"
    retry = "free"

    def report_kept(self, what: str, command: str) -> None:
        """Replaces the general fix by what was kept and the command that resumes."""
        problems = (replace(problem, fix=None) for problem in self.problems)
        self.problems = (*problems, _clean(Problem("kept", what, fix=f"continue with {command}")))


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def reported(error: BaseException) -> ReportedError:
    """`error` itself, or a reported error that wraps an exception of a library or a bug."""
    if isinstance(error, ReportedError):
        return error
    message = f"{type(error).__name__}: {error}"
    result: JobError
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        result = OutOfMemoryError(
            "memory",
            message,
            fix="lower train.per_device_train_batch_size, train.per_device_eval_batch_size or "
            "data.max_pixels, or turn on train.gradient_checkpointing",
        )
    elif is_disk_full(error):
        result = disk_full(error, "disk")
    elif isinstance(error, ModuleNotFoundError) and not (error.name or "job").startswith("job"):
        result = JobError(
            "python", f"has no package {error.name}", fix="make setup, or rebuild the image"
        )
    else:
        result = JobError("job", message, fix="run again with --debug and report the traceback")
    result.__cause__ = error
    return result


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk is full or a quota exceeded; safetensors and Arrow only put it in the text."""
    number = getattr(error, "errno", None)
    return number in _DISK_FULL or any(os.strerror(each) in str(error) for each in _DISK_FULL)


@contextmanager
def naming_full_disk(path: object) -> Iterator[None]:
    """Context in which a full disk is reported as such; `path` is named if the error names none."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(error, path) from error
        raise


def disk_full(error: BaseException, path: object) -> StorageError:
    """The error for a full disk; names the file of `error`, or else `path`."""
    return StorageError(
        str(getattr(error, "filename", None) or path),
        f"no space left on device: {type(error).__name__}: {error}",
        fix="free space there (python -m job clean), or set runtime.workdir to a folder on a "
        "larger volume",
    )


def _clean(problem: Problem) -> Problem:
    """Redacts the problem now: once a message is cut, part of a secret may go unrecognized."""

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
    """The value on one line; if longer than `limit` characters, with its middle cut out."""
    line = " ".join(value.split()) or repr(value)
    return line if len(line) <= limit else f"{line[: limit - 30]} … {line[-25:]}"


def exit_codes(retry: Retry) -> list[int]:
    """The exit codes of failures with this retry policy."""
    kinds = {*ReportedError.__subclasses__(), *JobError.__subclasses__()}
    return sorted({kind.exit_code for kind in kinds if kind.retry == retry})
