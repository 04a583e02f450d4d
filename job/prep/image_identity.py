"""A digest of the images that a source names by path, to detect changed images.

For local images it covers the size and the first and last 4 KiB: reading whole files would cost as
much as prep, and dates change when data is copied. For images in a store it covers the listing:
sizes, and versions if available. Images at web URLs are not covered.
"""

import hashlib
from collections.abc import Iterator

from job import storage
from job.errors import InputError
from job.prep import sources
from job.prep.columns import AmbiguousColumns, Columns
from job.prep.image_values import image_path
from job.prep.messages import image_values_of
from job.prep.readers import Record
from job.prep.source_files import DataSource, sample_digest
from job.prep.values import is_image_path
from job.spec.types import SourceSpec
from job.storage.digests import fingerprint


def digest(source: DataSource, spec: SourceSpec) -> str:
    """One digest of all images that the source's records name by path."""
    if source.builtin or _embeds_images(source, spec):
        return ""  # covered by the digest of the source itself
    # Updated record by record: a million paths need not fit in memory. The location of the lists
    # is not part of it, as the same data may be mounted elsewhere.
    hasher = hashlib.sha256()
    folders: set[tuple[str, str]] = set()
    for record in sources.read(source, spec):
        for path in _paths(record.parsed(), spec):
            if storage.is_local(record.base):
                hasher.update(f"{path}\0{_local_digest(record.base, path)}\0".encode())
            else:
                folders.add((record.base, path.rpartition("/")[0]))
    for base, folder in sorted(folders):
        if not base.startswith(("http://", "https://")):
            for file in storage.list_files(storage.join(base, folder)):
                listed = fingerprint(folder, file.path, file.size, file.version)
                hasher.update(listed.encode())
    return hasher.hexdigest()


def _embeds_images(source: DataSource, spec: SourceSpec) -> bool:
    """Whether the source's files contain the images; for tables, whether the first rows do.

    Such a table is not read further: that would download it only to find no path.
    """
    formats = {file.format for file in source.files}
    if formats <= {"imagefolder", "webdataset"}:
        return True
    if not formats <= {"parquet", "arrow"}:
        return False
    first = [value for record in sources.head(source) for value in _image_values(record, spec)]
    return bool(first) and not any(map(is_image_path, map(image_path, first)))


def _image_values(record: Record, spec: SourceSpec) -> list[object]:
    values = record.values or {}
    try:
        return list(image_values_of(values, Columns.of(spec.columns, values)))
    except AmbiguousColumns:
        return []  # prep reports it


def _paths(record: Record, spec: SourceSpec) -> Iterator[str]:
    """The image paths in a record, relative to its folder; other forms are part of the list."""
    for path in map(image_path, _image_values(record, spec)):
        if isinstance(path, str) and 0 < len(path) < 1024:
            path = sources.relative_to(record.base, path)
            if path and _is_relative(path):
                yield path


def _is_relative(path: str) -> bool:
    return not (".." in path or "\0" in path or ":" in path or path[0] in "/\\~")


def _local_digest(base: str, path: str) -> str | None:
    try:
        return sample_digest(storage.join(base, path))
    except (OSError, InputError):
        return None  # prep rejects the row; the digest changes when the image appears
