"""Writes to S3: single puts, multipart uploads, and conditional requests.

An object appears when it is complete. Parts are retried one by one; a failed upload is aborted,
because its parts cost money and appear in no listing.
"""

import secrets
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

from job import log
from job.errors import InputError, JobError, StorageError
from job.storage import failures, retry
from job.storage.backend import Backend, check_length, length_of
from job.storage.filesystem import S3FileSystem
from job.storage.uri import PROBE_PREFIX, join
from job.storage.write_guard import UNGUARDED, Conditions, Guard

Store = Backend[S3FileSystem]

PART = 16 * 2**20
"""Bytes in a part of a multipart upload; what fits into one part is a single put."""
PARTS_AT_ONCE = 4
"""Parts of an object uploaded in parallel."""
MOST_PARTS = 10_000
"""S3's limit for one upload."""
_REFUSED = ("PreconditionFailed", "412")
_UNSUPPORTED = ("NotImplemented", "501", "InvalidArgument", "InvalidRequest", "400")
_NO_OBJECT = {"IfMatch": '"00000000000000000000000000000000"'}
"""A condition that no object meets."""


class ObjectKey(TypedDict):
    """The object of a request."""

    Bucket: str
    Key: str


def put(store: Store, uri: str, source: bytes | Path, guard: Guard) -> None:
    """Stores bytes or a local file as one object and checks its length.

    Under a guard: reads the object's version, checks the guard, then writes on condition that the
    version is unchanged, if the store supports that.
    """
    length = length_of(source)

    def put_once(filesystem: S3FileSystem, path: str) -> None:
        target = _target(filesystem, path, uri)
        body = _part(source, 0, length)
        condition = _unchanged(filesystem, target) if guard.conditions.puts else {}
        with guard.writing(uri, conditional=guard.conditions.puts), _retrying_changes():
            filesystem.call_s3("put_object", **target, Body=body, **condition)
        check_length(filesystem, path, length)

    if length <= PART:
        store.call("write", uri, put_once)
    else:
        _put_parts(store, uri, source, length, guard)


def put_new(store: Store, uri: str, data: bytes) -> bool:
    """Stores `data` unless there is an object; returns whether this call stored it.

    Without conditional puts, two writers may both find nothing and both write.
    """

    def put_once(filesystem: S3FileSystem, path: str) -> bool:
        target = _target(filesystem, path, uri)
        try:
            filesystem.call_s3("put_object", **target, Body=data, IfNoneMatch="*")
        except Exception as error:
            match failures.code(error):
                case "PreconditionFailed" | "412":
                    pass
                case "NotImplemented" | "501":
                    if not filesystem.exists(path):
                        filesystem.call_s3("put_object", **target, Body=data)
                        return True
                case _:
                    raise
            # An earlier attempt may have succeeded although its response was lost.
            return filesystem.cat_file(path) == data
        return True

    return store.call("write", uri, put_once)


def delete_unchanged(store: Store, uri: str, guard: Guard) -> None:
    """Deletes the object, unless it changed since the guard was checked."""

    def remove(filesystem: S3FileSystem, path: str) -> None:
        target = _target(filesystem, path, uri)
        condition = _unchanged(filesystem, target)
        if "IfMatch" in condition:
            with guard.writing(uri, conditional=True), _retrying_changes():
                filesystem.call_s3("delete_object", **target, **condition)

    store.call("delete", uri, remove)


def conditions(store: Store, uri: str) -> Conditions:
    """Tests, on a hidden object below `uri`, which conditional requests the store honors.

    Some stores reject them as unsupported; others silently ignore the condition.
    """
    probe = join(uri, f"{PROBE_PREFIX}{secrets.token_hex(8)}")

    def refuses(method: str, **arguments: object) -> bool:
        def ask(filesystem: S3FileSystem, path: str) -> bool:
            target = _target(filesystem, path, uri)
            return _is_refused(lambda: filesystem.call_s3(method, **target, **arguments))

        return store.call("write", probe, ask)

    try:
        put(store, probe, b"probe", UNGUARDED)
        try:
            puts = refuses("put_object", Body=b"other", **_NO_OBJECT)
            puts = puts and refuses("put_object", Body=b"other", IfNoneMatch="*")
            completes = puts and _refuses_completion(store, probe)
            deletes = refuses("delete_object", **_NO_OBJECT)
        finally:
            store.call("delete", probe, lambda filesystem, path: filesystem.rm_file(path))
    except JobError as error:
        log.debug("conditional requests could not be tried", reason=error)
        return Conditions()
    return Conditions(puts=puts, completes=completes, deletes=deletes)


def _refuses_completion(store: Store, uri: str) -> bool:
    """Whether a multipart upload to an existing object is refused on condition."""

    def ask(filesystem: S3FileSystem, path: str) -> bool:
        target = _target(filesystem, path, uri)
        upload = filesystem.call_s3("create_multipart_upload", **target)["UploadId"]

        def complete() -> None:
            answer = filesystem.call_s3(
                "upload_part", **target, UploadId=upload, PartNumber=1, Body=b"other"
            )
            parts = {"Parts": [{"PartNumber": 1, "ETag": answer["ETag"]}]}
            filesystem.call_s3(
                "complete_multipart_upload",
                **target,
                UploadId=upload,
                MultipartUpload=parts,
                IfNoneMatch="*",
            )

        def abort() -> None:
            with suppress(Exception):
                filesystem.call_s3("abort_multipart_upload", **target, UploadId=upload)

        return _is_refused(complete, otherwise=abort)

    return store.call("write", uri, ask)


def _is_refused(request: Callable[[], object], otherwise: Callable[[], None] | None = None) -> bool:
    """Whether a request is refused because of its condition, not accepted or unsupported.

    `otherwise` cleans up after a request that failed.
    """
    try:
        request()
    except Exception as error:
        code = failures.code(error)
        if code not in _REFUSED and code not in _UNSUPPORTED:
            raise
        if otherwise is not None:
            otherwise()
        return code in _REFUSED
    return False


def abort_uploads(store: Store, uri: str, below: Collection[str], guard: Guard) -> int:
    """Aborts the unfinished multipart uploads to the folders `below` `uri`; returns how many.

    A killed process leaves their parts behind, which cost money and appear in no listing.
    """

    def abort(filesystem: S3FileSystem, path: str) -> int:
        bucket, prefix, _ = filesystem.split_path(path)
        prefix = f"{prefix.strip('/')}/".lstrip("/")
        answer = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
        uploads = [
            upload
            for upload in answer.get("Uploads") or ()
            if upload["Key"].removeprefix(prefix).split("/")[0] in below
        ]
        for upload in uploads:
            guard.ensure()
            filesystem.call_s3(
                "abort_multipart_upload",
                Bucket=bucket,
                Key=upload["Key"],
                UploadId=upload["UploadId"],
            )
        return len(uploads)

    return store.call("delete", uri, abort)


def _put_parts(store: Store, uri: str, source: bytes | Path, length: int, guard: Guard) -> None:
    step = max(PART, -(-length // MOST_PARTS))
    count = -(-length // step)

    def request(method: str, **arguments: object) -> dict[str, Any]:
        def send(filesystem: S3FileSystem, path: str) -> dict[str, Any]:
            target = _target(filesystem, path, uri)
            guard.ensure()
            return filesystem.call_s3(method, **target, **arguments)

        return store.call("write", uri, send)

    upload = request("create_multipart_upload")["UploadId"]
    stop = retry.stop_event()

    def send_part(index: int) -> dict[str, object]:
        body = _part(source, index * step, min(step, length - index * step))
        with retry.abandoned_if_set(stop):
            answer = request("upload_part", UploadId=upload, PartNumber=index + 1, Body=body)
        return {"PartNumber": index + 1, "ETag": answer["ETag"]}

    def complete(filesystem: S3FileSystem, path: str) -> None:
        target = _target(filesystem, path, uri)
        conditional = guard.conditions.completes
        condition = _unchanged(filesystem, target) if conditional else {}
        try:
            with guard.writing(uri, conditional=conditional), _retrying_changes():
                filesystem.call_s3(
                    "complete_multipart_upload",
                    **target,
                    UploadId=upload,
                    MultipartUpload={"Parts": parts},
                    **condition,
                )
        except FileNotFoundError:
            # No such upload: either an earlier attempt completed it and its answer was lost, …
            etag = filesystem.info(path).get("ETag", "").strip('"')
            if not etag.endswith(f"-{count}"):  # … or the object is not of this upload
                raise
        check_length(filesystem, path, length)

    try:
        with ThreadPoolExecutor(PARTS_AT_ONCE, "upload-part") as pool:
            parts = list(pool.map(send_part, range(count)))
        store.call("write", uri, complete)
    except BaseException:
        with suppress(Exception):
            filesystem = store.connect(uri)
            target = _target(filesystem, filesystem._strip_protocol(uri), uri)
            filesystem.call_s3("abort_multipart_upload", **target, UploadId=upload)
        raise


def _unchanged(filesystem: S3FileSystem, target: ObjectKey) -> dict[str, str]:
    """The condition that the object has the version it has now, or still does not exist."""
    try:
        head = filesystem.call_s3("head_object", **target)
    except FileNotFoundError:
        return {"IfNoneMatch": "*"}
    return {"IfMatch": head["ETag"]}


@contextmanager
def _retrying_changes() -> Iterator[None]:
    """Turns a failed condition into a transient failure, so that the guard is checked again."""
    try:
        yield
    except Exception as error:
        if failures.code(error) in _REFUSED:
            raise failures.Changed("the object changed while it was written") from None
        raise


def _target(filesystem: S3FileSystem, path: str, uri: str) -> ObjectKey:
    bucket, key, _ = filesystem.split_path(path)
    if not key:
        raise InputError(uri, "names a bucket, not an object", fix="add a key after the bucket")
    return {"Bucket": bucket, "Key": key}


def _part(source: bytes | Path, start: int, length: int) -> bytes:
    if isinstance(source, bytes):
        return source[start : start + length]
    with source.open("rb") as file:
        file.seek(start)
        data = file.read(length)
    if len(data) != length:
        raise StorageError(str(source), "changed while it was uploaded", fix="run again")
    return data
