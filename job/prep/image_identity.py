"""The identity of the pictures that a source's lists name, so that a changed one is noticed.

Local pictures count by their size and their first and last 4 KiB: reading them whole would cost
as much as prep, and dates change whenever data is copied. In a store it is its listing that
counts: sizes, and versions where it tells them. Pictures by web URL do not count.
"""

import hashlib
from collections.abc import Iterator

from job import storage
from job.errors import InputError
from job.prep import sources
from job.prep.columns import Columns, Unclear
from job.prep.discovery import StagedSource, sample_digest
from job.prep.messages import named_images, path_of
from job.prep.readers import Record
from job.prep.values import is_image_path
from job.spec.types import SourceSpec
from job.storage.digests import fingerprint


def digest(source: StagedSource, spec: SourceSpec) -> str:
    """One digest of all pictures that the records to be read name by a path."""
    if source.builtin or _holds_its_pictures(source, spec):
        return ""  # the source's own digest covers them
    # Added up as the records come: a list of a million pictures would not fit into little memory.
    # Where the lists lie is no part of it: the same data may be mounted elsewhere.
    found = hashlib.sha256()
    folders: set[tuple[str, str]] = set()
    for record in sources.read(source, spec):
        for path in _paths(record.parsed(), spec):
            if storage.is_local(record.base):
                found.update(f"{path}\0{_local(record.base, path)}\0".encode())
            else:
                folders.add((record.base, path.rpartition("/")[0]))
    for base, folder in sorted(folders):
        if not base.startswith(("http://", "https://")):
            for file in storage.list_files(storage.join(base, folder)):
                told = fingerprint(folder, file.path, file.size, file.version)
                found.update(told.encode())
    return found.hexdigest()


def _holds_its_pictures(source: StagedSource, spec: SourceSpec) -> bool:
    """Whether pictures lie in the source's files; of tables, if the first that are shown do.

    A table that does is not read through: it would be downloaded only to find no name in it.
    """
    formats = {file.format for file in source.files}
    if formats <= {"imagefolder", "webdataset"}:
        return True
    if not formats <= {"parquet", "arrow"}:
        return False
    shown = [each for record in sources.head(source) for each in _named(record, spec)]
    return bool(shown) and not any(map(is_image_path, map(path_of, shown)))


def _named(record: Record, spec: SourceSpec) -> list[object]:
    values = record.values or {}
    try:
        return list(named_images(values, Columns.of(spec.columns, values)))
    except Unclear:
        return []  # prep says so


def _paths(record: Record, spec: SourceSpec) -> Iterator[str]:
    """The paths that a record names, in its list's folder; what else is there is in the list."""
    for path in map(path_of, _named(record, spec)):
        if isinstance(path, str) and 0 < len(path) < 1024:
            path = sources.from_folder(record.base, path)
            if path and _is_relative(path):
                yield path


def _is_relative(path: str) -> bool:
    return not (".." in path or "\0" in path or ":" in path or path[0] in "/\\~")


def _local(base: str, path: str) -> str | None:
    try:
        return sample_digest(storage.join(base, path))
    except (OSError, InputError):
        return None  # prep rejects the row, and notices when the picture is there
