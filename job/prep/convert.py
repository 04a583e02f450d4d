"""One record to a row or to a reject, and which columns to read it by."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

from job import storage
from job.errors import DataError
from job.prep import sources
from job.prep.columns import Columns, Missing
from job.prep.find import StagedSource
from job.prep.messages import RowRefused, to_row
from job.prep.readers import Record
from job.prep.records import Reject, Row
from job.redaction import printable, redact
from job.spec.names import nearest
from job.spec.types import DataSpec, SourceSpec

_FETCHED_AHEAD = 8
_SHOWN = 40  # characters of a value in the sample of a row


def find_columns(source: StagedSource, spec: SourceSpec, field: str) -> Columns:
    """The columns to read. Raises DataError, with a sample row, where the mapping cannot work."""
    if source.builtin:
        return Columns(image="image", text="text", question=None, messages=None, id=None)
    records = sources.head(source)
    names = [name for record in records for name in record.values or ()]
    names += ["text" for record in records if record.text_path]
    present = tuple(dict.fromkeys(names))
    if not present:
        raise DataError(
            field, "has no readable record", value=spec.uri, fix="check the file and `format`"
        )
    resolved = Columns.resolve(spec.columns, present)
    if isinstance(resolved, Missing):
        known = {"image", "text", *(name for name in asdict(spec.columns).values() if name)}
        free = [name for name in present if name not in known] or list(present)
        likely = nearest(resolved.column, free) or free[0]
        raise DataError(
            f"{field}.columns.{resolved.key}",
            f"there is no column `{resolved.column}`; the source has {', '.join(present)}; "
            f"{records[0].id} is {_sample(records[0].values or {})}",
            value=spec.uri,
            fix=f"name the column that holds it, for example {resolved.key}: {likely}",
        )
    return resolved


def to_results(
    records: Sequence[Record], columns: Columns, spec: DataSpec
) -> Iterator[Row | Reject]:
    """`to_result` of each, in order; images that come over a network are fetched a few at once."""
    remote = any(record.base and not storage.is_local(record.base) for record in records)
    if not remote and not spec.allow_image_urls:
        yield from (to_result(record, columns, spec) for record in records)
        return
    with ThreadPoolExecutor(_FETCHED_AHEAD, thread_name_prefix="prep") as threads:
        for start in range(0, len(records), 4 * _FETCHED_AHEAD):
            some = records[start : start + 4 * _FETCHED_AHEAD]
            yield from threads.map(lambda record: to_result(record, columns, spec), some)


def to_result(record: Record, columns: Columns, spec: DataSpec) -> Row | Reject:
    """The record's row, or why it is none."""
    record = record.parsed()
    if record.values is None:
        return _reject(record.id, record.problem or "unreadable")
    named = record.values.get(columns.id) if columns.id else None
    row_id = printable(record.id if named is None else f"{record.id} ({named})")

    def fetch(path: str) -> bytes:
        return sources.fetch(record.base, path, urls=spec.allow_image_urls)

    try:
        if record.text_path is not None:
            text = fetch(record.text_path).decode("utf-8-sig").strip()
            record = replace(record, values={**record.values, "text": text})
        assert record.values is not None
        return to_row(
            record.values, columns, row_id=row_id, instruction=spec.instruction, fetch=fetch
        )
    except (RowRefused, OSError, UnicodeDecodeError) as error:
        return _reject(row_id, str(error))


def _reject(row_id: str, reason: str) -> Reject:
    """One line, whatever the row held, for its list and for a terminal."""
    return Reject(id=printable(row_id), reason=printable(redact(reason)))


def _sample(values: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"{name}: {_short(value)}" for name, value in values.items()) + "}"


def _short(value: object) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        return _sample(value)
    text = " ".join(redact(str(value)).split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
