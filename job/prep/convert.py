"""Converts records to rows or rejects."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from job import storage
from job.prep import sources
from job.prep.columns import AmbiguousColumns, ReadOptions
from job.prep.messages import to_row
from job.prep.readers import Record
from job.prep.rows import Reject, Row, RowRefused
from job.redaction import printable, redact

_DOWNLOAD_THREADS = 8


def to_results(records: Sequence[Record], options: ReadOptions) -> Iterator[Row | Reject]:
    """`to_result` of each record, in order; remote images are downloaded in parallel."""
    remote = any(record.base and not storage.is_local(record.base) for record in records)
    if not remote and not options.allow_image_urls:
        yield from (to_result(record, options) for record in records)
        return
    with ThreadPoolExecutor(_DOWNLOAD_THREADS, thread_name_prefix="prep") as threads:
        for start in range(0, len(records), 4 * _DOWNLOAD_THREADS):
            some = records[start : start + 4 * _DOWNLOAD_THREADS]
            yield from threads.map(lambda record: to_result(record, options), some)


def to_result(record: Record, options: ReadOptions) -> Row | Reject:
    """Converts a record to a row, or a reject with the reason."""
    record = record.parsed()
    if record.values is None:
        return _reject(record.id, record.problem or "unreadable")
    row_id = printable(record.id)

    def fetch(path: str) -> bytes:
        return sources.fetch(record.base, path, urls=options.allow_image_urls)

    try:
        values = record.values
        if record.text_path is not None:
            text = fetch(record.text_path).decode("utf-8-sig").strip()
            values = {**values, "text": text}
        own_id = values.get(options.columns.id or "id")
        if own_id is not None:
            row_id = printable(f"{record.id} ({own_id})")
        return to_row(values, options, row_id=row_id, fetch=fetch)
    except UnicodeDecodeError as error:
        return _reject(row_id, f"its text file is not UTF-8: {error}")
    except (RowRefused, AmbiguousColumns, OSError) as error:
        return _reject(row_id, str(error))


def _reject(row_id: str, reason: str) -> Reject:
    """A reject with id and reason redacted and printable."""
    return Reject(id=printable(redact(row_id)), reason=printable(redact(reason)))
