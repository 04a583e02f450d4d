"""Classifies storage failures and turns them into errors with a fix.

Transient failures are retried, and raise StorageError if they persist. What the user must fix, such
as a missing object or denied access, raises InputError at once.
"""

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from job.errors import InputError, JobError, MissingInputError, StorageError
from job.redaction import redact
from job.storage import paths
from job.storage.uri import local_path

Operation = Literal["read", "write", "list", "delete", "copy"]
Kind = Literal[
    "missing",
    "denied",
    "expired",
    "transient",
    "full",
    "read-only",
    "untrusted",
    "invalid",
    "failed",
]

_HTTP_TYPES: Mapping[str, Kind] = dict.fromkeys(
    (
        *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError", "httpx.TransportError"),
        *("requests.ConnectionError", "requests.Timeout", "urllib3.ProtocolError"),
        "http.IncompleteRead",
    ),
    "transient",
)
_TRANSIENT_ERRNO = {
    *(errno.EIO, errno.ESTALE, errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.ENETUNREACH),
    *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.EINTR),
}
_KIND_OF_ERRNO: Mapping[int, Kind] = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EROFS: "read-only",
    errno.ENAMETOOLONG: "invalid",
    errno.ELOOP: "invalid",
    errno.ENOTEMPTY: "invalid",
}


class Truncated(OSError):
    """A transfer moved fewer or more bytes than the file has; transient."""


class Changed(OSError):
    """An object changed between reading its version and writing it; transient."""


class Explainer:
    """Classifies the failures of a kind of storage and tells how to fix them.

    Suitable for any store; backends override what they know better.
    """

    kinds_by_code: ClassVar[Mapping[str, Kind]] = {}
    """Kinds by the error codes of the server."""
    kinds_by_type: ClassVar[Mapping[str, Kind]] = {}
    """Kinds by exception class, as `package.Class`, so that no package is imported for it."""

    def fix_missing(self, uri: str) -> str:
        return "check the URI"

    def fix_denied(self, uri: str, operation: Operation, reason: str) -> str:
        return "give this job credentials for that server"

    def fix_invalid(self, uri: str) -> str:
        return "correct the URI or what it points to"

    def fix_failed(self, uri: str) -> str:
        return "check the server, the volume and the network; then run again"

    def diagnose(self, error: BaseException | None) -> Kind | None:
        """The kind of failure; None if the error is not a storage failure.

        Libraries wrap server responses in their own, sometimes misleading errors, so the innermost
        cause decides.
        """
        chain = tuple(_chain(error))
        if not chain or any(isinstance(each, JobError) for each in chain):
            return None
        if any("CERTIFICATE_VERIFY_FAILED" in str(each) for each in chain):
            return "untrusted"
        for each in reversed(chain):
            if kind := self._kind_of_answer(each) or self._kind_of_type(each):
                return kind
        return None

    def explain(
        self, error: BaseException, operation: Operation, uri: str, attempts: int = 1
    ) -> JobError | None:
        """The error to report for `error`; None if it is not a storage failure."""
        kind = self.diagnose(error)
        reason, failed = cause(error), f"cannot {operation}"
        match kind:
            case None:
                return None
            case "missing":
                fix = self.fix_missing(uri)
                return MissingInputError(uri, f"{failed}: not found: {reason}", fix=fix)
            case "denied" | "expired":
                fix = self.fix_denied(uri, operation, reason)
                return InputError(uri, f"{failed}: access denied: {reason}", fix=fix)
            case "read-only":
                return InputError(
                    uri,
                    f"{failed}: the file system is mounted read-only: {reason}",
                    fix="mount it writable, or name a path on a writable volume",
                )
            case "invalid":
                return InputError(uri, f"{failed}: {reason}", fix=self.fix_invalid(uri))
            case "untrusted":
                return InputError(
                    uri,
                    f"{failed}: the server's certificate is not trusted: {reason}",
                    fix="set AWS_CA_BUNDLE (S3) or SSL_CERT_FILE to the CA's certificate file",
                )
            case "full":
                return StorageError(
                    uri,
                    f"{failed}: no space left: {reason}",
                    fix="free some space or raise the quota there, or name a larger volume",
                )
            case "transient" | "failed":
                times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
                fix = self.fix_failed(uri) if kind == "transient" else "see the server's answer"
                return StorageError(uri, f"{failed} after {times}: {reason}", fix=fix)

    def _kind_of_answer(self, error: BaseException) -> Kind | None:
        status, code, _ = _answer(error)
        if not status and not code:
            return None
        if kind := self.kinds_by_code.get(code):
            return kind
        match status:
            case 404:
                return "missing"
            case 507:
                return "full"
            case 401 | 403:
                return "denied"
            case 408 | 409 | 425 | 429:
                return "transient"
        return "transient" if status and status >= 500 and status != 501 else "failed"

    def _kind_of_type(self, error: BaseException) -> Kind | None:
        for kind in type(error).__mro__:
            name = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
            if name in self.kinds_by_type:
                return self.kinds_by_type[name]
            if name in _HTTP_TYPES:
                return _HTTP_TYPES[name]
        if isinstance(
            error, Truncated | Changed | TimeoutError | ConnectionError | socket.gaierror
        ):
            return "transient"
        if isinstance(error, FileNotFoundError):
            return "missing"
        if isinstance(error, PermissionError):
            return "denied"
        if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
            return "invalid"
        if isinstance(error, OSError):
            number = error.errno or 0
            return (
                "transient" if number in _TRANSIENT_ERRNO else _KIND_OF_ERRNO.get(number, "failed")
            )
        return "invalid" if isinstance(error, ValueError | NotImplementedError) else None


class _LocalExplainer(Explainer):
    """For this machine's file system."""

    def fix_missing(self, uri: str) -> str:
        return paths.fix_missing(local_path(uri))

    def fix_invalid(self, uri: str) -> str:
        return paths.fix_invalid(local_path(uri)) or super().fix_invalid(uri)

    def fix_denied(self, uri: str, operation: Operation, reason: str) -> str:
        return f"let user id {os.getuid()} {operation} there, or name another path"


LOCAL = _LocalExplainer()


def cause(error: BaseException | None) -> str:
    """The cause on one line, redacted: the server's answer if there is one."""
    for each in reversed(tuple(_chain(error))):
        status, code, message = _answer(each)
        if status or code:
            return _line(" ".join(filter(None, (code or f"HTTP {status}", message))))
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # fsspec raises this for every HTTP failure, with only the URL
    return _line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def code(error: BaseException) -> str:
    """The server's error code, or its HTTP status; empty if no server answered."""
    for each in reversed(tuple(_chain(error))):
        status, code, _ = _answer(each)
        if status or code:
            return code or str(status)
    return ""


def is_unexplained(error: BaseException) -> bool:
    """Whether a server refused without a reason, as in the answer to a HEAD request."""
    answers = [_answer(each) for each in _chain(error)]
    return any(status in (400, 403) and not code for status, code, _ in answers)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _answer(error: BaseException) -> tuple[int | None, str, str]:
    """The server's HTTP status, error code and message, if the error carries an answer."""
    response: object = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        detail = response.get("Error", {})
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(detail.get("Code", ""))
        if code.isdecimal():  # a HEAD has no body, so its code is the status again
            status, code = status or int(code), ""
        return status, code, str(detail.get("Message", ""))
    status = getattr(response, "status_code", None)  # httpx, requests
    if status is None:
        status = getattr(error, "status", None)  # aiohttp
    if isinstance(status, int):
        return status, "", str(getattr(error, "message", "") or error)
    return None, "", ""


def _line(text: str, limit: int = 300) -> str:
    line = " ".join(redact(text).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
