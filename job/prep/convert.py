"""One record to a row or to a reject."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from job import storage
from job.prep import sources
from job.prep.columns import Reading, Unclear
from job.prep.messages import RowRefused, to_row
from job.prep.readers import Record
from job.prep.rows import Reject, Row
from job.redaction import printable, redact

_FETCHED_AHEAD = 8


def to_results(records: Sequence[Record], reading: Reading) -> Iterator[Row | Reject]:
    """`to_result` of each, in order; images that come over a network are fetched a few at once."""
    remote = any(record.base and not storage.is_local(record.base) for record in records)
    if not remote and not reading.allow_image_urls:
        yield from (to_result(record, reading) for record in records)
        return
    with ThreadPoolExecutor(_FETCHED_AHEAD, thread_name_prefix="prep") as threads:
        for start in range(0, len(records), 4 * _FETCHED_AHEAD):
            some = records[start : start + 4 * _FETCHED_AHEAD]
            yield from threads.map(lambda record: to_result(record, reading), some)


def to_result(record: Record, reading: Reading) -> Row | Reject:
    """The record's row, or why it is none."""
    record = record.parsed()
    if record.values is None:
        return _reject(record.id, record.problem or "unreadable")
    row_id = printable(record.id)

    def fetch(path: str) -> bytes:
        return sources.fetch(record.base, path, urls=reading.allow_image_urls)

    try:
        values = record.values
        if record.text_path is not None:
            text = fetch(record.text_path).decode("utf-8-sig").strip()
            values = {**values, "text": text}
        named = values.get(reading.columns.id or "id")
        if named is not None:
            row_id = printable(f"{record.id} ({named})")
        return to_row(values, reading, row_id=row_id, fetch=fetch)
    except UnicodeDecodeError as error:
        return _reject(row_id, f"its text is not UTF-8: {error}")
    except (RowRefused, Unclear, OSError) as error:
        return _reject(row_id, str(error))


def _reject(row_id: str, reason: str) -> Reject:
    """One line, whatever the row held, for its list and for a terminal."""
    return Reject(id=printable(redact(row_id)), reason=printable(redact(reason)))
