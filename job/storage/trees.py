"""Copies and deletes directories and prefixes, a few files in parallel."""

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path

from job import log
from job.errors import InputError, Stopped, StorageError
from job.storage import local, retry
from job.storage.backend import Entry
from job.storage.backends import backend_of
from job.storage.files import (
    download,
    list_files,
    missing_error,
    refuse_read_only,
    upload,
)
from job.storage.uri import is_local, is_root, join, local_path, scheme
from job.storage.write_guard import UNGUARDED, Conditions, Guard

FILES_AT_ONCE = 4
"""Files of a tree copied in parallel."""
_SHOWN_FROM = 64 * 2**20  # bytes; smaller trees finish too soon for a progress bar


def download_tree(uri: str, directory: Path) -> tuple[Entry, ...]:
    """Copies every file below `uri` to `directory`; returns which.

    Raises InputError if there is none, or if a name could leave `directory`.
    """
    entries = list_files(uri)
    if not entries:
        raise missing_error(uri)

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
    final: bool = False,
) -> tuple[Entry, ...]:
    """Stores every file below `directory` under `uri`, except those in `without`; returns which.

    Files in `last` are stored after all others, one by one in that order, so that the last can mark
    the tree as complete. `final` is as for `upload`. Raises InputError if one of `last` is missing.
    """
    refuse_read_only(uri)
    listed = list_files(str(directory))
    entries = {entry.path: entry for entry in listed if entry.path not in without}
    for path in last:
        if path not in entries:
            raise InputError(str(directory / path), "cannot upload: not found")

    def copy(entry: Entry) -> None:
        upload(directory / entry.path, join(uri, entry.path), guard, final=final)

    _each("upload", [entry for path, entry in entries.items() if path not in last], copy)
    for path in last:
        copy(entries[path])
    return tuple(entries.values())


def copy_tree(source_uri: str, target_uri: str) -> tuple[Entry, ...]:
    """Copies every file below one URI to another; returns which.

    Within one store the server copies if it can; otherwise each file is downloaded and uploaded.
    Raises InputError if the source is empty.
    """
    refuse_read_only(target_uri)
    if is_local(target_uri):
        return download_tree(source_uri, local_path(target_uri))
    if is_local(source_uri):
        return upload_tree(local_path(source_uri), target_uri)
    entries = list_files(source_uri)
    if not entries:
        raise missing_error(source_uri)

    from tempfile import TemporaryDirectory  # 10 ms that other commands need not pay

    def copy(entry: Entry) -> None:
        source, target = join(source_uri, entry.path), join(target_uri, entry.path)
        if scheme(source) == scheme(target) and backend_of(source).copies:
            backend_of(source).copy(source, target, entry.size)
            return
        with TemporaryDirectory() as directory:
            path = Path(directory, "file")
            download(source, path)
            backend_of(target).put(target, path)

    _each("copy", entries, copy)
    return entries


def delete_tree(uri: str, guard: Guard = UNGUARDED) -> None:
    """Deletes everything below a directory or prefix.

    A marker that makes the tree count as complete must be deleted first, by the caller. Files are
    removed one by one, each under the guard.
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
    backend, root = backend_of(uri), uri.rstrip("/")
    entries = backend.listing(uri)
    _each("delete", entries, lambda entry: backend.delete(f"{root}/{entry.path}", guard))


def delete_unfinished(uri: str, below: Collection[str], guard: Guard = UNGUARDED) -> int:
    """Removes hidden leftovers of killed uploads to the folders `below` `uri`; returns how many.

    Only S3 has any. The caller must ensure that no job is uploading there.
    """
    return backend_of(uri).delete_unfinished(uri, below, guard)


def conditions(uri: str) -> Conditions:
    """Tests which conditional requests the store honors below `uri`; only S3 can have any."""
    return backend_of(uri).conditions(uri)


def _each(label: str, entries: Sequence[Entry], work: Callable[[Entry], None]) -> None:
    """Calls `work` for all entries, a few at a time; the first failure cancels the rest."""
    stop = threading.Event()

    def task(entry: Entry) -> Entry:
        with retry.abandoned_if_set(stop):
            work(entry)
        return entry

    pool = ThreadPoolExecutor(FILES_AT_ONCE, label)
    # Largest first, so that no large file is left for the end.
    queue = sorted(entries, key=lambda entry: -entry.size)
    try:
        _watch(label, [pool.submit(task, entry) for entry in queue], entries)
    except BaseException as error:
        stop.set()
        # A job that is asked to stop has too little time left to finish a large file.
        asked_to_stop = isinstance(error, Stopped | KeyboardInterrupt)
        pool.shutdown(wait=not asked_to_stop, cancel_futures=True)
        raise
    pool.shutdown()


def _watch(label: str, futures: Sequence[Future[Entry]], entries: Sequence[Entry]) -> None:
    """Waits for all, raises the first failure, and shows a progress bar for a large tree."""
    total = sum(entry.size for entry in entries)
    if total < _SHOWN_FROM:
        for future in as_completed(futures):
            future.result()
        return
    with log.progress(label, -(-total // 2**20), "MiB") as bar:
        done = shown = 0
        for future in as_completed(futures):
            done += future.result().size
            if more := -(-done // 2**20) - shown:  # less than one MiB is not shown
                bar.advance(more)
                shown += more
