"""The identity of the pictures that a source's lists name, so that a changed one is noticed.

Local pictures count by their size and their first and last 4 KiB: reading them whole would cost
as much as prep, and dates change whenever data is copied. In a store it is its listing that
counts: sizes, and versions where it tells them. Pictures by web URL do not count.
"""

import hashlib
from collections.abc import Iterator

from job import storage
from job.errors import InputError
from job.manifest import fingerprint
from job.prep import sources
from job.prep.columns import Columns, Missing
from job.prep.find import StagedSource, sample_digest
from job.prep.messages import named_images
from job.prep.readers import Record
from job.spec.types import SourceSpec


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
    """Whether pictures lie in the source's files; of tables, as far as the first rows tell.

    A table that does is not read through: it would be downloaded only to find no name in it.
    """
    formats = {file.format for file in source.files}
    if formats <= {"imagefolder", "webdataset"}:
        return True
    if not formats <= {"parquet", "arrow"}:
        return False
    return not any(any(_paths(record, spec)) for record in sources.head(source))


def _paths(record: Record, spec: SourceSpec) -> Iterator[str]:
    """The paths that a record names, in its list's folder; what else is there is in the list."""
    values = record.values or {}
    columns = Columns.resolve(spec.columns, tuple(values))
    if isinstance(columns, Missing):
        return  # prep says so
    for each in named_images(values, columns):
        path = each
        if isinstance(each, dict):
            path = None if each.get("bytes") else each.get("path")
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
