"""One record to a row or to a reject, and which columns to read it by."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

from job import storage
from job.errors import DataError
from job.prep import sources
from job.prep.columns import Columns, Missing
from job.prep.find import PICTURES, StagedSource, suffix
from job.prep.messages import RowRefused, to_row
from job.prep.readers import Record
from job.prep.records import Reject, Row
from job.redaction import printable, redact
from job.spec.names import nearest
from job.spec.types import DataSpec, SourceSpec

_FETCHED_AHEAD = 8
_ANSWERS = ("latex", "formula", "equation", "caption", "transcription", "ground_truth", "target")
"""What data sets call the column `text`."""
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
        raise DataError(
            f"{field}.columns.{resolved.key}",
            f"there is no column `{resolved.column}`; the source has {', '.join(present)}; "
            f"{records[0].id} is {_sample(records[0].values or {})}",
            value=spec.uri,
            fix=_which_column(resolved, spec, records, present),
        )
    return resolved


def _which_column(
    missing: Missing, spec: SourceSpec, records: Sequence[Record], present: Sequence[str]
) -> str:
    """What to write, with the column that is likely meant by its name and by its values."""
    taken = {"image", "text", "id", *(name for name in asdict(spec.columns).values() if name)}
    values = {name: [(r.values or {}).get(name) for r in records] for name in present}
    free = [name for name in present if name not in taken]
    shown = [name for name in free if any(map(_is_picture, values[name]))]
    if missing.key == "image":
        fit = shown or free
    else:
        fit = [name for name in free if name not in shown]
        fit.sort(key=lambda name: not any(map(_is_words, values[name])))
    usual = [name for name in fit if missing.key == "text" and name.lower() in _ANSWERS]
    likely = next((n for n in (nearest(missing.column, fit), *usual, *fit) if n), None)
    if likely is None:
        return "none of these looks like it: check `uri` and `format`"
    return f"name the column that holds it, for example {missing.key}: {likely}"


def _is_words(value: object) -> bool:
    return isinstance(value, str) and not value.strip().isdecimal()


def _is_picture(value: object) -> bool:
    """Whether a value is a picture, or names one."""
    match value:
        case bytes() | {"bytes": bytes()}:
            return True
        case {"path": inner} | [inner, *_]:
            return _is_picture(inner)
        case str():
            return value.startswith("data:image/") or suffix(value) in PICTURES
    return False


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
    return Reject(id=printable(redact(row_id)), reason=printable(redact(reason)))


def _sample(values: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"{name}: {_short(value)}" for name, value in values.items()) + "}"


def _short(value: object) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        return _sample(value)
    text = " ".join(redact(str(value)).split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
