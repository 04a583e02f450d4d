"""Explains failures of a push to the hub."""

import re
from collections.abc import Iterator

from job.errors import JobError, StorageError
from job.redaction import redact
from job.storage.backends.hub import Hub
from job.storage.failures import Kind, Operation

_QUOTA = re.compile(r"storage|quota|limit reached|payment", re.IGNORECASE)
_PAYMENT, _FORBIDDEN, _CONFLICT = 402, 403, 412
_LONGEST = 300  # characters of the hub's message


class PushExplainer(Hub):
    """Like that of `hf://` inputs, for writes: quota, concurrent commits, missing permission."""

    def __init__(self, repository: str) -> None:
        self._owner = repository.partition("/")[0]

    def explain(
        self, error: BaseException, operation: Operation, uri: str, attempts: int = 1
    ) -> JobError | None:
        if any(_status(each) == _CONFLICT for each in _chain(error)):
            return StorageError(
                uri,
                "the branch got another commit during the push, which was not made",
                fix="run again: it pushes on top of that commit",
            )
        if self.diagnose(error) == "full":
            said = next(filter(None, map(_said, _chain(error))), "")
            return StorageError(
                uri,
                f"cannot {operation}: the hub refuses more data: {said}",
                fix=f"free storage of {self._owner} on the hub or extend its plan, then run again: "
                "what was uploaded is not sent twice",
            )
        return super().explain(error, operation, uri, attempts)

    def fix_denied(self, uri: str, operation: Operation, reason: str) -> str:
        return (
            f"set HF_TOKEN to a valid token with write access to the repositories of {self._owner}"
        )

    def fix_missing(self, uri: str) -> str:
        return "run again: it creates repository and branch"

    def _kind_of_answer(self, error: BaseException) -> Kind | None:
        status = _status(error)
        if status == _PAYMENT or (status == _FORBIDDEN and _QUOTA.search(_said(error))):
            return "full"
        return super()._kind_of_answer(error)

    def _kind_of_type(self, error: BaseException) -> Kind | None:
        if isinstance(error, ValueError) and "LFS batch" in str(error):
            return "full" if _QUOTA.search(str(error)) else "failed"
        kind = super()._kind_of_type(error)
        # The uploader of hf_xet raises plain RuntimeErrors if its connection fails.
        return "transient" if kind is None and isinstance(error, RuntimeError) else kind


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _said(error: BaseException) -> str:
    """The hub's own message; for its LFS protocol it is in the exception."""
    response = getattr(error, "response", None)
    if response is None:
        return _line(str(error)) if isinstance(error, ValueError) else ""
    return _line(response.headers.get("X-Error-Message") or response.text)


def _line(text: str) -> str:
    return " ".join(redact(text).split())[:_LONGEST]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
