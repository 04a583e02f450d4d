"""What a storage failure is, and what to tell the user about it.

A passing failure is tried again and ends as StorageError; a missing object or a refused key is
the user's to mend, at once, as InputError.
"""

import errno
import os
import socket
from collections.abc import Iterator
from typing import Any, Literal

from job.errors import InputError, JobError, MissingInputError, StorageError
from job.redaction import redact
from job.storage.uri import scheme

Operation = Literal["read", "write", "list", "delete", "copy"]
Kind = Literal[
    "missing", "denied", "expired", "passing", "full", "read-only", "untrusted", "invalid", "failed"
]

_MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchUpload", "NoSuchVersion"}
_DENIED = {
    *("AccessDenied", "AllAccessDisabled", "AccountProblem", "AuthorizationHeaderMalformed"),
    *("InvalidAccessKeyId", "InvalidSecurity", "InvalidToken", "PermanentRedirect"),
    *("RequestTimeTooSkewed", "SignatureDoesNotMatch"),
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioStorageQuotaExceeded"}
_PASSING = {
    *("BadDigest", "IncompleteBody", "InternalError", "OperationAborted", "RequestTimeout"),
    *("ConditionalRequestConflict", "ServiceUnavailable", "SlowDown", "ThrottlingException"),
    *("Throttling", "TooManyRequests", "RequestLimitExceeded", "XAmzContentSHA256Mismatch"),
}
_DENIED_TYPES = {  # by name, so that nothing heavy is imported to look at an error
    *("botocore.NoCredentialsError", "botocore.PartialCredentialsError"),
    *("botocore.CredentialRetrievalError", "botocore.ProfileNotFound"),
    *("botocore.TokenRetrievalError", "botocore.NoAuthTokenError"),
}
_PASSING_TYPES = {
    *("botocore.HTTPClientError", "botocore.ConnectionError", "botocore.IncompleteReadError"),
    *(
        "botocore.ChecksumError",
        "botocore.FlexibleChecksumError",
        "botocore.ResponseParserError",
        "http.IncompleteRead",
    ),
    *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError", "httpx.TransportError"),
    *("requests.ConnectionError", "requests.Timeout", "urllib3.ProtocolError"),
}
_PASSING_ERRNO = {
    *(errno.EIO, errno.ESTALE, errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.ENETUNREACH),
    *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.EINTR),
}
_KIND_OF_ERRNO: dict[int, Kind] = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EROFS: "read-only",
    errno.ENAMETOOLONG: "invalid",
    errno.ENOTEMPTY: "invalid",
}


class Truncated(OSError):
    """Fewer or more bytes than there should be: a transfer to repeat."""


class Changed(OSError):
    """An object is not the one that was looked at before it was written: a request to repeat."""


def diagnose(error: BaseException | None) -> Kind | None:
    """What kind of failure this is; None when it is no failure of storage.

    The libraries wrap the answer of a server in errors of their own, and not always in fitting
    ones, so the cause below decides before the error above it.
    """
    chain = tuple(_chain(error))
    if not chain or any(isinstance(each, JobError) for each in chain):
        return None
    if any(_is_certificate(each) for each in chain):
        return "untrusted"
    for each in reversed(chain):
        kind = _kind_of_answer(each) or _kind_of_type(each)
        if kind:
            return kind
    return None


def explain(
    error: BaseException, operation: Operation, uri: str, attempts: int = 1
) -> JobError | None:
    """The error to show for `error`; None when it is no failure of storage."""
    kind = diagnose(error)
    field, why = uri, cause(error)
    verb = f"cannot {operation}"
    match kind:
        case None:
            return None
        case "missing":
            return MissingInputError(
                field, f"{verb}, nothing is there: {why}", fix=fix_missing(uri)
            )
        case "denied" | "expired":
            return InputError(
                field, f"{verb}, access is denied: {why}", fix=_fix_denied(uri, operation, why)
            )
        case "read-only":
            return InputError(
                field,
                f"{verb}, the file system is mounted read-only: {why}",
                fix="mount it writable, or name a path on a volume that is",
            )
        case "invalid":
            return InputError(field, f"{verb}: {why}", fix="correct the URI or what is there")
        case "untrusted":
            return InputError(
                field,
                f"{verb}, the server's certificate is not trusted: {why}",
                fix="set AWS_CA_BUNDLE (S3) or SSL_CERT_FILE to the file of its authority",
            )
        case "full":
            return StorageError(
                field,
                f"{verb}, no space is left: {why}",
                fix="free some space or raise the quota there, or name a larger volume",
            )
        case "passing" | "failed":
            times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
            return StorageError(
                field, f"{verb} after {times}: {why}", fix=_fix_failed(uri, kind == "passing")
            )


def cause(error: BaseException | None) -> str:
    """What happened, on one line, in the words closest to it and without secrets."""
    for each in reversed(tuple(_chain(error))):
        status, code, message = _answer(each)
        if status or code:
            return _line(" ".join(filter(None, (code or f"HTTP {status}", message))))
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # fsspec calls every failure over HTTP so, and adds the URL only
    return _line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def code(error: BaseException) -> str:
    """What a server calls the failure, or its HTTP status; empty where no server answered."""
    for each in reversed(tuple(_chain(error))):
        status, code, _ = _answer(each)
        if status or code:
            return code or str(status)
    return ""


def is_unexplained(error: BaseException) -> bool:
    """Whether a server refused without saying why, as the answer to a HEAD does."""
    answers = [_answer(each) for each in _chain(error)]
    return any(status in (400, 403) and not code for status, code, _ in answers)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _answer(error: BaseException) -> tuple[int | None, str, str]:
    """A server's status, S3 error code and message, where the error carries an answer."""
    response: Any = getattr(error, "response", None)
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


def _kind_of_answer(error: BaseException) -> Kind | None:
    status, code, _ = _answer(error)
    if not status and not code:
        return None
    if code in _MISSING or status == 404:
        return "missing"
    if code in _EXPIRED:
        return "expired"
    if code in _FULL or status == 507:
        return "full"
    if code in _DENIED or status in (401, 403):
        return "denied"
    if code in _PASSING or status in (408, 409, 425, 429):
        return "passing"
    return "passing" if status and status >= 500 and status != 501 else "failed"


def _kind_of_type(error: BaseException) -> Kind | None:
    names = {f"{c.__module__.partition('.')[0]}.{c.__name__}" for c in type(error).__mro__}
    if names & _DENIED_TYPES:
        return "denied"
    passing = (Truncated, Changed, TimeoutError, ConnectionError, socket.gaierror)
    if names & _PASSING_TYPES or isinstance(error, passing):
        return "passing"
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, PermissionError):
        return "denied"
    if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
        return "invalid"
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return "passing"  # the hub's client for a download of the wrong length
    if isinstance(error, OSError):
        number = error.errno or 0
        return "passing" if number in _PASSING_ERRNO else _KIND_OF_ERRNO.get(number, "failed")
    if any(name.startswith("botocore.") for name in names):
        return "invalid"  # a bucket name, a region or an endpoint that cannot be
    return "invalid" if isinstance(error, ValueError | NotImplementedError) else None


def _is_certificate(error: BaseException) -> bool:
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def _line(text: str, limit: int = 300) -> str:
    line = " ".join(redact(text).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _endpoint() -> str:
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f"AWS_ENDPOINT_URL (now {redact(url)})" if url else "AWS_ENDPOINT_URL (now unset: AWS)"


def fix_missing(uri: str) -> str:
    match scheme(uri):
        case "s3" | "s3a":
            return (
                f"check the bucket and the key, create the bucket if need be; check {_endpoint()}"
            )
        case "hf":
            return "check repository, revision and path; set HF_TOKEN if the repository is private"
        case "file":
            return "check the path, and that its volume is mounted"
        case _:
            return "check the URI"


def _fix_denied(uri: str, operation: Operation, why: str) -> str:
    match scheme(uri):
        case "s3" | "s3a":
            if "RequestTimeTooSkewed" in why:
                return "set this machine's clock"
            if "PermanentRedirect" in why or "AuthorizationHeaderMalformed" in why:
                return "set AWS_DEFAULT_REGION to the region of the bucket"
            rights = "list" if operation == "list" else f"list and {operation}"
            reads = operation in ("read", "list")
            public = ", or FSSPEC_S3_ANON=true for a public bucket" if reads else ""
            return (
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN with "
                f"temporary keys) to keys that may {rights} there{public}; "
                f"check {_endpoint()}"
            )
        case "hf":
            return (
                "check the repository's name; if it is private or gated, set HF_TOKEN to a token "
                "of an account that was granted access"
            )
        case "file":
            return f"let user id {os.getuid()} {operation} there, or name another path"
        case _:
            return "give this job credentials for that server"


def _fix_failed(uri: str, passing: bool) -> str:
    if not passing:
        return "see the server's answer"
    match scheme(uri):
        case "s3" | "s3a":
            return f"check the server and the network, and {_endpoint()}; then run again"
        case "hf":
            return "check the network, and HF_ENDPOINT; then run again"
        case _:
            return "check the server, the volume and the network; then run again"
