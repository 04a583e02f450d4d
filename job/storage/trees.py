"""Whole directories and prefixes, a few files at a time."""

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from job import log
from job.errors import InputError, Stopped, StorageError
from job.storage import connect, local, remote, retry, s3
from job.storage.files import (
    Entry,
    download,
    list_files,
    nothing_there,
    refuse_read_only,
    upload,
)
from job.storage.uri import is_local, is_root, join, local_path, scheme
from job.storage.write_guard import UNGUARDED, Conditions, Guard

FILES_AT_ONCE = 4
"""Files of a tree that are copied together."""
_SHOWN_FROM = 64 * 2**20  # bytes; a smaller tree is done before a progress bar would be read


def download_tree(uri: str, directory: Path) -> tuple[Entry, ...]:
    """Copies every file below `uri` to `directory` and tells which.

    Raises InputError where there is none, or where a name could leave `directory`.
    """
    entries = list_files(uri)
    if not entries:
        raise nothing_there(uri)

    def copy(entry: Entry) -> None:
        download(join(uri, entry.path), directory / entry.path)

    _each("download", entries, copy)
    return entries


def upload_tree(
    directory: Path,
    uri: str,
    *,
    last: Sequence[str] = (),
    without: Collection[str] = (),
    guard: Guard = UNGUARDED,
) -> tuple[Entry, ...]:
    """Stores every file below `directory` under `uri`, but for those `without`; tells which.

    Files named in `last` follow when all others are stored, one after the other in that order,
    so that the last of them can mark the tree as complete. Raises InputError if one is missing.
    """
    refuse_read_only(uri)
    found = list_files(str(directory))
    entries = {entry.path: entry for entry in found if entry.path not in without}
    for path in last:
        if path not in entries:
            raise InputError(str(directory / path), "cannot upload, nothing is there")

    def copy(entry: Entry) -> None:
        upload(directory / entry.path, join(uri, entry.path), guard)

    _each("upload", [entry for path, entry in entries.items() if path not in last], copy)
    for path in last:
        copy(entries[path])
    return tuple(entries.values())


def copy_tree(source_uri: str, target_uri: str) -> tuple[Entry, ...]:
    """Copies every file below one URI to another and tells which.

    Between two places of one object store its server copies; otherwise files pass through a
    temporary one. Raises InputError where the source has none.
    """
    refuse_read_only(target_uri)
    if is_local(target_uri):
        return download_tree(source_uri, local_path(target_uri))
    if is_local(source_uri):
        return upload_tree(local_path(source_uri), target_uri)
    entries = list_files(source_uri)
    if not entries:
        raise nothing_there(source_uri)

    from tempfile import TemporaryDirectory  # 10 ms that other commands need not pay

    def copy(entry: Entry) -> None:
        source, target = join(source_uri, entry.path), join(target_uri, entry.path)
        if scheme(source) == scheme(target):
            remote.copy(source, target, entry.size)
            return
        with TemporaryDirectory() as directory:
            path = Path(directory, "file")
            download(source, path)
            remote.put(target, path)

    _each("copy", entries, copy)
    return entries


def delete_tree(uri: str, guard: Guard = UNGUARDED) -> None:
    """Removes everything below a directory or prefix; nothing happens where there is nothing.

    A marker that makes the tree count as complete is for the caller to delete first. Files go
    one by one, each under the guard.
    Raises StorageError for a whole bucket or file system.
    """
    refuse_read_only(uri)
    if is_root(uri):
        raise StorageError(
            uri, "is a whole bucket or file system, which is never deleted", fix="name a directory"
        )
    if is_local(uri):
        root_path = local_path(uri)
        retry.call("delete", uri, lambda: local.delete_tree(root_path, lambda: guard.writing(uri)))
        return
    found = connect.call("list", uri, remote.listing)
    entries = [Entry(path, count) for path, count, *_ in found]
    root = uri.rstrip("/")
    _each("delete", entries, lambda entry: remote.delete(f"{root}/{entry.path}", guard))


def delete_unfinished(uri: str, below: Collection[str], guard: Guard = UNGUARDED) -> int:
    """Removes what killed uploads to the folders `below` `uri` left unseen; tells how many.

    Only S3 keeps such parts. The caller must know that nobody is uploading there.
    """
    return s3.abort_uploads(uri, below, guard) if scheme(uri) in ("s3", "s3a") else 0


def conditions(uri: str) -> Conditions:
    """What the store does with conditional requests below `uri`, as it is seen to do it.

    Only S3 has them.
    """
    return s3.conditions(uri) if scheme(uri) in ("s3", "s3a") else Conditions()


def _each(label: str, entries: Sequence[Entry], work: Callable[[Entry], None]) -> None:
    """Does `work` for all entries, a few at a time; the first failure ends the rest."""
    stop = threading.Event()

    def task(entry: Entry) -> Entry:
        with retry.abandoned_with(stop):
            work(entry)
        return entry

    pool = ThreadPoolExecutor(FILES_AT_ONCE, label)
    # The largest go first, so that the last to finish is not the longest.
    queue = sorted(entries, key=lambda entry: -entry.size)
    try:
        _watch(label, [pool.submit(task, entry) for entry in queue], entries)
    except BaseException as error:
        stop.set()
        # Who is asked to stop has seconds to say so, and none to wait for the largest file.
        asked_to_stop = isinstance(error, Stopped | KeyboardInterrupt)
        pool.shutdown(wait=not asked_to_stop, cancel_futures=True)
        raise
    pool.shutdown()


def _watch(label: str, futures: Sequence[Future[Entry]], entries: Sequence[Entry]) -> None:
    """Waits for all, raises the first failure, and shows how far the bytes of a large tree are."""
    total = sum(entry.size for entry in entries)
    if total < _SHOWN_FROM:
        for future in as_completed(futures):
            future.result()
        return
    with log.progress(label, -(-total // 2**20), "MiB") as bar:
        done = shown = 0
        for future in as_completed(futures):
            done += future.result().size
            if more := -(-done // 2**20) - shown:  # small files are no news
                bar.advance(more)
                shown += more
