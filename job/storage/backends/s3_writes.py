"""Putting objects into S3, where an object appears when its last part is in.

A single put, or a multipart upload whose parts are tried again one by one; an upload that fails
is aborted, because parts that nobody completes cost money and show in no listing.
"""

import secrets
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from job import log
from job.errors import InputError, JobError, StorageError
from job.storage import failures, retry
from job.storage.connect import call, connect
from job.storage.uri import PROBE, join
from job.storage.write_guard import UNGUARDED, Conditions, Guard

PART = 16 * 2**20
"""Bytes in one part of a multipart upload; anything that fits into one part is put at once."""
PARTS_AT_ONCE = 4
"""Parts of one object under way together."""
MOST_PARTS = 10_000
"""What S3 allows in one upload."""
_REFUSED = ("PreconditionFailed", "412")
_UNKNOWN = ("NotImplemented", "501", "InvalidArgument", "InvalidRequest", "400")
_NO_OBJECT = {"IfMatch": '"00000000000000000000000000000000"'}
"""A condition that no object meets."""


def put(uri: str, source: bytes | Path, guard: Guard = UNGUARDED) -> None:
    """Stores bytes or a local file as one object and checks its length. Errors: `retry.call`.

    Under a guard the object is looked at first, then the guard is asked, and the store is told to
    refuse the object if it is another by then, as far as the store can.
    """
    length = length_of(source)

    def put_once(filesystem: Any, path: str) -> None:
        bucket, key = _bucket_and_key(filesystem, path, uri)
        body = _part(source, 0, length)
        wanted = _unchanged(filesystem, bucket, key) if guard.conditions.puts else {}
        with guard.writing(uri, conditional=guard.conditions.puts), _noticing_changes():
            filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=body, **wanted)
        check_length(filesystem, path, length)

    if length <= PART:
        call("write", uri, put_once)
    else:
        _put_parts(uri, source, length, guard)


def delete_unchanged(uri: str, guard: Guard) -> None:
    """Removes the object that is there when the guard is asked, and none that came since."""

    def remove(filesystem: Any, path: str) -> None:
        bucket, key = _bucket_and_key(filesystem, path, uri)
        wanted = _unchanged(filesystem, bucket, key)
        if "IfMatch" in wanted:
            with guard.writing(uri, conditional=True), _noticing_changes():
                filesystem.call_s3("delete_object", Bucket=bucket, Key=key, **wanted)

    call("delete", uri, remove)


def conditions(uri: str) -> Conditions:
    """Tries with a hidden object below `uri` which conditional requests the store refuses.

    Some stores do not know them and say so; others take no notice, which nothing tells but this.
    """
    place = join(uri, f"{PROBE}{secrets.token_hex(8)}")

    def refuses(method: str, **arguments: object) -> bool:
        def ask(filesystem: Any, path: str) -> bool:
            bucket, key = _bucket_and_key(filesystem, path, uri)
            try:
                filesystem.call_s3(method, Bucket=bucket, Key=key, **arguments)
            except Exception as error:
                code = failures.code(error)
                if code in _REFUSED or code in _UNKNOWN:
                    return code in _REFUSED
                raise
            return False

        return call("write", place, ask)

    try:
        put(place, b"probe")
        try:
            puts = refuses("put_object", Body=b"other", **_NO_OBJECT)
            puts = puts and refuses("put_object", Body=b"other", IfNoneMatch="*")
            completes = puts and _refuses_completion(place)
            deletes = refuses("delete_object", **_NO_OBJECT)
        finally:
            call("delete", place, lambda filesystem, path: filesystem.rm_file(path))
    except JobError as error:
        log.debug("conditional requests could not be tried", reason=error)
        return Conditions()
    return Conditions(puts=puts, completes=completes, deletes=deletes)


def _refuses_completion(uri: str) -> bool:
    """Whether an upload in parts is refused whose object is there already."""

    def ask(filesystem: Any, path: str) -> bool:
        bucket, key = _bucket_and_key(filesystem, path, uri)
        place: dict[str, Any] = {"Bucket": bucket, "Key": key}
        place["UploadId"] = filesystem.call_s3("create_multipart_upload", **place)["UploadId"]
        try:
            answer = filesystem.call_s3("upload_part", **place, PartNumber=1, Body=b"other")
            parts = {"Parts": [{"PartNumber": 1, "ETag": answer["ETag"]}]}
            filesystem.call_s3(
                "complete_multipart_upload", **place, MultipartUpload=parts, IfNoneMatch="*"
            )
        except Exception as error:
            code = failures.code(error)
            if code not in _REFUSED and code not in _UNKNOWN:
                raise
            with suppress(Exception):
                filesystem.call_s3("abort_multipart_upload", **place)
            return code in _REFUSED
        return False

    return call("write", uri, ask)


def _unchanged(filesystem: Any, bucket: str, key: str) -> dict[str, str]:
    """The condition that the object is as it is now, or is not there."""
    try:
        found = filesystem.call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return {"IfNoneMatch": "*"}
    return {"IfMatch": found["ETag"]}


@contextmanager
def _noticing_changes() -> Iterator[None]:
    """Within, a refused condition is a failure to try again: then the guard is asked anew."""
    try:
        yield
    except Exception as error:
        if failures.code(error) in _REFUSED:
            raise failures.Changed("the object changed while it was written") from None
        raise


def put_new(uri: str, data: bytes) -> bool:
    """Stores `data` where there is no object; tells whether it did, or an attempt before it.

    A store without conditional puts is looked at before, which leaves a moment for another.
    """

    def put_once(filesystem: Any, path: str) -> bool:
        bucket, key = _bucket_and_key(filesystem, path, uri)
        try:
            filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except Exception as error:
            match failures.code(error):
                case "PreconditionFailed" | "412":
                    pass
                case "NotImplemented" | "501":
                    if not filesystem.exists(path):
                        filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=data)
                        return True
                case _:
                    raise
            # The answer to an attempt that succeeded may have been lost.
            return bool(filesystem.cat_file(path) == data)
        return True

    return call("write", uri, put_once)


def abort_uploads(uri: str, below: Collection[str], guard: Guard = UNGUARDED) -> int:
    """Aborts the unfinished multipart uploads to the folders `below` `uri`; tells how many.

    A process that was killed leaves its parts behind: they cost money and show in no listing.
    """

    def abort(filesystem: Any, path: str) -> int:
        bucket, prefix, _ = filesystem.split_path(path)
        prefix = f"{prefix.strip('/')}/".lstrip("/")
        answer = filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
        found = [
            each
            for each in answer.get("Uploads") or ()
            if each["Key"].removeprefix(prefix).split("/")[0] in below
        ]
        for each in found:
            guard.ensure()
            filesystem.call_s3(
                "abort_multipart_upload", Bucket=bucket, Key=each["Key"], UploadId=each["UploadId"]
            )
        return len(found)

    return call("delete", uri, abort)


def _put_parts(uri: str, source: bytes | Path, length: int, guard: Guard) -> None:
    step = max(PART, -(-length // MOST_PARTS))
    count = -(-length // step)

    def request(method: str, **arguments: object) -> dict[str, Any]:
        def send(filesystem: Any, path: str) -> dict[str, Any]:
            bucket, key = _bucket_and_key(filesystem, path, uri)
            guard.ensure()
            answer: dict[str, Any] = filesystem.call_s3(method, Bucket=bucket, Key=key, **arguments)
            return answer

        return call("write", uri, send)

    upload = request("create_multipart_upload")["UploadId"]

    stop = retry.stop_event()

    def send_part(index: int) -> dict[str, object]:
        body = _part(source, index * step, min(step, length - index * step))
        with retry.abandoned_with(stop):
            answer = request("upload_part", UploadId=upload, PartNumber=index + 1, Body=body)
        return {"PartNumber": index + 1, "ETag": answer["ETag"]}

    def complete(filesystem: Any, path: str) -> None:
        bucket, key = _bucket_and_key(filesystem, path, uri)
        conditional = guard.conditions.completes
        wanted = _unchanged(filesystem, bucket, key) if conditional else {}
        try:
            with guard.writing(uri, conditional=conditional), _noticing_changes():
                filesystem.call_s3(
                    "complete_multipart_upload",
                    Bucket=bucket,
                    Key=key,
                    UploadId=upload,
                    MultipartUpload={"Parts": parts},
                    **wanted,
                )
        except FileNotFoundError:
            # No such upload: an earlier attempt completed it and its answer was lost, or not.
            tag = filesystem.info(path).get("ETag", "").strip('"')
            if not tag.endswith(f"-{count}"):
                raise
        check_length(filesystem, path, length)

    try:
        with ThreadPoolExecutor(PARTS_AT_ONCE, "upload-part") as pool:
            parts = list(pool.map(send_part, range(count)))
        call("write", uri, complete)
    except BaseException:
        with suppress(Exception):
            filesystem = connect(uri)
            bucket, key = _bucket_and_key(filesystem, filesystem._strip_protocol(uri), uri)
            filesystem.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)
        raise


def _bucket_and_key(filesystem: Any, path: str, uri: str) -> tuple[str, str]:
    bucket, key, _ = filesystem.split_path(path)
    if not key:
        raise InputError(uri, "names a bucket, not an object", fix="add a key after the bucket")
    return bucket, key


def _part(source: bytes | Path, start: int, length: int) -> bytes:
    if isinstance(source, bytes):
        return source[start : start + length]
    with source.open("rb") as file:
        file.seek(start)
        data = file.read(length)
    if len(data) != length:
        raise StorageError(str(source), "changed while it was uploaded", fix="run again")
    return data


def check_length(filesystem: Any, path: str, length: int) -> None:
    """Raises Truncated when the object at `path` is not `length` bytes long."""
    stored = filesystem.info(path)["size"]
    if stored != length:
        raise failures.Truncated(f"{stored} bytes are stored where {length} were sent")


def length_of(source: bytes | Path) -> int:
    """The bytes in a source of an upload."""
    return len(source) if isinstance(source, bytes) else source.stat().st_size
