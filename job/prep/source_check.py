"""Whether the rows of a source can be read as the spec says, by the first of them.

What is wrong with every row is told at once, with a sample and the line to write. Rows need not all
be alike: each is read by the columns that it has, and refused alone if those do not make a row.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from job.errors import DataError
from job.prep import sources
from job.prep.columns import IMAGE, MESSAGES, QUESTION, TEXT, Columns, Reading, Unclear
from job.prep.discovery import StagedSource
from job.prep.messages import image_line, unread_images
from job.prep.readers import Record
from job.prep.values import is_absent, looks_like_image, without_nulls
from job.redaction import redact
from job.spec.foreign_names import nearest
from job.spec.types import DataSpec, SourceSpec

_ANSWERS = ("latex", "formula", "equation", "caption", "transcription", "ground_truth", "target")
"""What data sets call the column `text`."""
_SHOWN = 40  # characters of a value in the sample of a row


def find_reading(source: StagedSource, spec: SourceSpec, data: DataSpec, field: str) -> Reading:
    """How the source's records become rows.

    Raises DataError, with a sample row, if the columns cannot make rows, if a column of images
    would not be read, or if nothing says what rows of an image and its text ask.
    """
    reading = Reading.of(spec, data)
    if source.builtin:
        return reading
    records = sources.head(source)
    present = _present(records)
    if not present:
        bad = next((record for record in sources.first(source) if record.problem), None)
        raise DataError(
            bad.id if bad else field,
            (bad and bad.problem) or "has no readable record",
            value=spec.uri,
            fix=_mend(source, bad.problem if bad else None),
        )
    if _missing(reading, present) is not None:
        records = sources.head(source, sources.FURTHER)  # columns may come later
        present = _present(records)
        if (missing := _missing(reading, present)) is not None:
            key, column = missing
            shown = ", ".join(present)
            raise DataError(
                f"{field}.columns.{key}",
                f"there is no column `{column}`; the source has {shown}; {_shown(records[0])}",
                value=spec.uri,
                fix=_which_column(key, column, reading, records, present),
            )
    for record in records:
        _check(record, reading, field)
    return reading


def _asks_itself(columns: Columns, values: Mapping[str, object]) -> bool:
    """Whether a record has a question of its own, or messages."""
    asked = columns.question is not None and not is_absent(values[columns.question])
    return columns.messages is not None or asked


def _mend(source: StagedSource, problem: str | None) -> str:
    if problem is not None and "UTF-8" in problem:
        return f"save it as UTF-8: iconv -f LATIN1 -t UTF-8 {source.files[0].name} > new"
    return "check the file and `format`"


def _present(records: Iterable[Record]) -> tuple[str, ...]:
    names = [name for record in records for name in record.values or ()]
    names += ["text" for record in records if record.text_path]
    return tuple(dict.fromkeys(names))


def _missing(reading: Reading, present: Sequence[str]) -> tuple[str, str] | None:
    """The key of `columns` and the name of a column that rows are read by and none of them has."""
    spec, there = reading.columns, set(present)
    for key, name in asdict(spec).items():
        if name is not None and name not in there:
            return key, name
    own = spec.text is not None or spec.question is not None
    if spec.messages or (not own and there & {*MESSAGES}):
        return None
    if spec.text is None and not there & {*TEXT}:
        return "text", "text"
    asked = spec.question or there & {*QUESTION, "input"}
    if not asked and (reading.text_only or (spec.image is None and not there & {*IMAGE})):
        # The instruction asks about an image: without one it trains nothing.
        return ("question", "question") if reading.text_only else ("image", "image")
    return None


def _check(record: Record, reading: Reading, field: str) -> None:
    """Raises DataError if the record shows what would go wrong with all that are like it."""
    values: Mapping[str, object] = {
        name: without_nulls(value) for name, value in (record.values or {}).items()
    }
    if record.text_path is not None:
        values = {**values, "text": record.text_path}
    try:
        columns = Columns.of(reading.columns, values, text_only=reading.text_only)
    except Unclear as error:
        raise DataError(
            f"{field}.columns.{error.key}",
            f"{error}; {_shown(record)}",
            fix=f"name the one that is meant, for example {error.key}: {error.names[0]}",
        ) from error
    for name in unread_images(values, columns, reading):
        raise DataError(
            f"{field}.columns.image",
            f"column `{name}` holds images and would not be read; {_shown(record)}",
            fix=f"{image_line(name, columns)}, or set data.text_only: true to train on text alone",
        )
    pair = columns.text is not None and columns.image is not None
    if pair and reading.instruction is None and not _asks_itself(columns, values):
        raise DataError(
            "$.data.instruction",
            f"must say what is asked: rows have no question of their own; {_shown(record)}",
            fix='for example instruction: "What does the image say?"; a column of questions is '
            "named by columns: {question: NAME}",
        )


def _which_column(
    key: str, column: str, reading: Reading, records: Sequence[Record], present: Sequence[str]
) -> str:
    """What to write, with the column that is likely meant by its name and by its values."""
    named = (name for name in asdict(reading.columns).values() if name)
    taken = {"image", "text", "id", "system", "history", *named}
    taken |= {*QUESTION, *MESSAGES} if key == "text" else {*TEXT}
    values = {name: [(r.values or {}).get(name) for r in records] for name in present}
    free = [name for name in present if name not in taken]
    shown = [name for name in free if any(map(looks_like_image, values[name]))]
    if key == "image":
        fit = shown or free
    else:
        texts = [n for n in free if any(isinstance(value, str) for value in values[n])]
        fit = [name for name in texts if name not in shown]
        fit.sort(key=lambda name: not any(map(_is_words, values[name])))
    usual = [name for name in fit if key == "text" and name.lower() in _ANSWERS]
    likely = next((n for n in (nearest(column, fit), *usual, *fit) if n), None)
    lists = [n for n in free if any(isinstance(value, list) for value in values[n])]
    if likely is None and key == "text" and (held := [n for n in lists if n not in shown]):
        return f"`{held[0]}` holds lists: write one answer of a row as `text`"
    if likely is None:
        return "none of these looks like it: check `uri` and `format`"
    written = likely if likely == likely.strip() else json.dumps(likely)
    return f"name the column that holds it, for example {key}: {written}"


def _is_words(value: object) -> bool:
    return isinstance(value, str) and not value.strip().isdecimal()


def _shown(record: Record) -> str:
    return f"{record.id} is {_sample(record.values or {})}"


def _sample(values: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"{name}: {_short(value)}" for name, value in values.items()) + "}"


def _short(value: object) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        return _sample(value)
    text = " ".join(redact(str(value)).split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
