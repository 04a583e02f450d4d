"""Estimates the size of the prepared rows from the first rows of local sources, without a model."""

from job import storage
from job.planning.sample import first_rows
from job.prep import sources
from job.prep.discovery import find_source
from job.prep.rows import Row
from job.prep.shards import BYTES_BESIDE_IMAGES
from job.spec.types import FORMULAS, DataSpec, SourceSpec

FORMULA_BYTES = 16 * 2**10
"""Of a rendered formula, at most on the average."""


def stored_bytes(spec: DataSpec) -> int | None:
    """The bytes of all prepared rows, of streamed sources too; None if a source or the images that
    it names are not local, since they would have to be downloaded.

    Raises InputError if a source is missing, and DataError if its columns cannot make rows.
    """
    total = 0.0
    for field, source in spec.sources().items():
        if source.uri == FORMULAS:
            total += (source.limit or 0) * FORMULA_BYTES
        elif not storage.is_local(source.uri) or spec.allow_image_urls:
            return None
        else:
            total += _stored(spec, field, source)
    return round(total)


def _stored(spec: DataSpec, field: str, source: SourceSpec) -> float:
    found = find_source(source, field)
    rows = [row for row in first_rows(found, source, field, spec) if isinstance(row, Row)]
    stored = sum(len(image.data) for row in rows for image in row.images)
    stored += sum(len(message.text) for row in rows for message in row.messages)
    count, _ = sources.estimate_count(found, source)
    return count * (stored / max(1, len(rows)) + BYTES_BESIDE_IMAGES)
