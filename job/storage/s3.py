"""Putting objects into S3, where an object appears when its last part is in.

A single put, or a multipart upload whose parts are tried again one by one; an upload that fails
is aborted, because parts that nobody completes cost money and show in no listing.
"""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from job.errors import InputError, StorageError
from job.storage import failures, retry
from job.storage.connect import call, connect

PART = 16 * 2**20
"""Bytes in one part of a multipart upload; anything that fits into one part is put at once."""
PARTS_AT_ONCE = 4
"""Parts of one object under way together."""
MOST_PARTS = 10_000
"""What S3 allows in one upload."""


def put(uri: str, source: bytes | Path) -> None:
    """Stores bytes or a local file as one object and checks its length. Errors: `retry.call`."""
    length = length_of(source)

    def put_once(filesystem: Any, path: str) -> None:
        bucket, key = _bucket_and_key(filesystem, path, uri)
        body = _part(source, 0, length)
        filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=body)
        check_length(filesystem, path, length)

    if length <= PART:
        call("write", uri, put_once)
    else:
        _put_parts(uri, source, length)


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


def abort_uploads(uri: str, below: Collection[str]) -> int:
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
            filesystem.call_s3(
                "abort_multipart_upload", Bucket=bucket, Key=each["Key"], UploadId=each["UploadId"]
            )
        return len(found)

    return call("delete", uri, abort)


def _put_parts(uri: str, source: bytes | Path, length: int) -> None:
    step = max(PART, -(-length // MOST_PARTS))
    count = -(-length // step)

    def request(method: str, **arguments: object) -> dict[str, Any]:
        def send(filesystem: Any, path: str) -> dict[str, Any]:
            bucket, key = _bucket_and_key(filesystem, path, uri)
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
        try:
            filesystem.call_s3(
                "complete_multipart_upload",
                Bucket=bucket,
                Key=key,
                UploadId=upload,
                MultipartUpload={"Parts": parts},
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
