"""`s3://`: S3 and compatible stores, with keys and endpoint from the environment."""

import hashlib
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from job.redaction import redact
from job.storage import connect
from job.storage.backend import Backend
from job.storage.backends import s3_writes
from job.storage.failures import Kind, Operation
from job.storage.filesystem import S3FileSystem
from job.storage.write_guard import UNGUARDED, Conditions, Guard

AWS = (".amazonaws.com", ".amazonaws.com.cn")
"""Servers with one namespace of buckets for all accounts."""
VIRTUAL_HOSTED = (
    *(".aliyuncs.com", ".myqcloud.com"),
    *(".volces.com", ".ivolces.com", ".bytepluses.com", ".ibytepluses.com"),
)
"""Servers that refuse what boto does at an endpoint of one's own.

They want the bucket in the host's name, not in the path, and take no body in chunks with a checksum
behind it (`aws-chunked`).
"""
_STATIC = ("env", "explicit", "shared-credentials-file", "config-file")

_CODES: Mapping[Kind, tuple[str, ...]] = {
    "missing": ("NoSuchKey", "NoSuchBucket", "NoSuchUpload", "NoSuchVersion"),
    "expired": ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"),
    "full": (
        *("InsufficientStorage", "QuotaExceeded"),
        *("XMinioStorageFull", "XMinioStorageQuotaExceeded"),
    ),
    "denied": (
        *("AccessDenied", "AllAccessDisabled", "AccountProblem", "AuthorizationHeaderMalformed"),
        *("InvalidAccessKeyId", "InvalidSecurity", "InvalidToken", "PermanentRedirect"),
        *("RequestTimeTooSkewed", "SignatureDoesNotMatch"),
    ),
    "transient": (
        *("BadDigest", "IncompleteBody", "InternalError", "OperationAborted", "RequestTimeout"),
        *("ConditionalRequestConflict", "ServiceUnavailable", "SlowDown", "ThrottlingException"),
        *("Throttling", "TooManyRequests", "RequestLimitExceeded", "XAmzContentSHA256Mismatch"),
    ),
}
_TYPES: Mapping[Kind, tuple[str, ...]] = {
    "denied": (
        *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
        *("ProfileNotFound", "TokenRetrievalError", "NoAuthTokenError"),
    ),
    "transient": (
        *("HTTPClientError", "ConnectionError", "IncompleteReadError", "ChecksumError"),
        *("FlexibleChecksumError", "ResponseParserError"),
    ),
    # Any other error is an invalid bucket name, region or endpoint.
    "invalid": ("BotoCoreError", "ClientError"),
}


class S3(Backend[S3FileSystem]):
    """Uses s3fs. Writes are single puts or multipart uploads, conditional under a guard."""

    kinds_by_code: ClassVar = {code: kind for kind, codes in _CODES.items() for code in codes}
    kinds_by_type: ClassVar = {
        f"botocore.{name}": kind for kind, names in _TYPES.items() for name in names
    }

    def options(self, uri: str) -> dict[str, object]:
        region = os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
        return {
            "client_kwargs": {"region_name": region} if region else {},
            "config_kwargs": {
                "connect_timeout": connect.CONNECT_SECONDS,
                "read_timeout": connect.READ_SECONDS,
                "max_pool_connections": 32,
                # `retry` retries; two policies would multiply.
                "retries": {"total_max_attempts": 1},
                **_dialect(),
            },
        }

    def create(self, protocol: str, uri: str) -> S3FileSystem:
        filesystem = super().create(protocol, uri)
        filesystem.retries = 1
        return filesystem

    def raise_reason(self, filesystem: S3FileSystem, path: str) -> None:
        """Repeats a refused HEAD as a GET, whose response has a body with the reason.

        It tells, for example, expired keys from invalid ones.
        """
        bucket, key, _ = filesystem.split_path(path)
        if key:
            filesystem.call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")
        else:
            filesystem.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
        raise ConnectionError("access was denied, then granted")  # so it is transient

    # --- writing ----------------------------------------------------------------------------

    def put(self, uri: str, source: bytes | Path, guard: Guard = UNGUARDED) -> None:
        s3_writes.put(self, uri, source, guard)

    def put_new(self, uri: str, data: bytes) -> bool:
        return s3_writes.put_new(self, uri, data)

    def delete(self, uri: str, guard: Guard = UNGUARDED) -> None:
        if guard.conditions.deletes:
            s3_writes.delete_unchanged(self, uri, guard)
        else:
            super().delete(uri, guard)

    def conditions(self, uri: str) -> Conditions:
        return s3_writes.conditions(self, uri)

    def delete_unfinished(self, uri: str, below: Collection[str], guard: Guard) -> int:
        return s3_writes.abort_uploads(self, uri, below, guard)

    # --- identity ---------------------------------------------------------------------------

    def identity(self, uri: str) -> dict[str, object]:
        """The key, with server and account as resolved by the connection."""
        server = self.call("read", uri, lambda filesystem, _: _server(filesystem))
        return {"path": self.key(uri), **server}

    # --- advice -----------------------------------------------------------------------------

    def fix_missing(self, uri: str) -> str:
        return f"check the bucket and the key, create the bucket if need be; check {_endpoint()}"

    def fix_denied(self, uri: str, operation: Operation, reason: str) -> str:
        if "RequestTimeTooSkewed" in reason:
            return "set this machine's clock"
        if "PermanentRedirect" in reason or "AuthorizationHeaderMalformed" in reason:
            return "set AWS_DEFAULT_REGION to the region of the bucket"
        permissions = "list" if operation == "list" else f"list and {operation}"
        reads = operation in ("read", "list")
        public = ", or FSSPEC_S3_ANON=true for a public bucket" if reads else ""
        return (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN with "
            f"temporary keys) to keys that may {permissions} there{public}; check {_endpoint()}"
        )

    def fix_failed(self, uri: str) -> str:
        return f"check the server and the network, and {_endpoint()}; then run again"


def _dialect() -> dict[str, object]:
    """Settings of boto that the server needs; for others they are the user's."""
    if not (urlsplit(_endpoint_url()).hostname or "").endswith(VIRTUAL_HOSTED):
        return {}
    return {
        "s3": {"addressing_style": "virtual"},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }


def _endpoint_url() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _server(filesystem: S3FileSystem) -> dict[str, object]:
    meta = filesystem.s3.meta
    host = urlsplit(meta.endpoint_url).hostname or ""
    if host.endswith(AWS):
        return {"server": str(meta.partition)}
    return {"server": meta.endpoint_url.rstrip("/"), "account": _account(filesystem)}


def _account(filesystem: S3FileSystem) -> str:
    """A digest of the access key id, which identifies the account.

    Roles get new keys every hour, so for them the digest is of the role's name.
    """
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.session import get_session

    name = filesystem.key or ""
    with suppress(BotoCoreError, ClientError):
        if not name and (credentials := get_session().get_credentials()) is not None:
            role = os.environ.get("AWS_ROLE_ARN", credentials.method)
            name = credentials.access_key if credentials.method in _STATIC else role
    return hashlib.sha256(str(name).encode()).hexdigest()[:16]


def _endpoint() -> str:
    url = _endpoint_url()
    return f"AWS_ENDPOINT_URL (now {redact(url)})" if url else "AWS_ENDPOINT_URL (now unset: AWS)"
