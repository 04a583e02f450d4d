"""Checks whether a source's first rows can be read as the spec describes.

A problem of all rows is reported once, with a sample row and the fix. Rows may have different
columns: each is later read by its own columns, and rejected individually if it is not a valid row.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Self

from job.errors import DataError
from job.prep import sources
from job.prep.columns import (
    IMAGE,
    MESSAGES,
    QUESTION,
    TEXT,
    AmbiguousColumns,
    Columns,
    ReadOptions,
)
from job.prep.messages import ignored_image_columns, image_column_fix
from job.prep.readers import Record
from job.prep.source_files import DataSource
from job.prep.values import is_absent, looks_like_image, without_nulls
from job.redaction import redact
from job.spec.foreign_names import nearest
from job.spec.types import DataSpec, SourceSpec

ANSWER_NAMES = ("latex", "formula", "equation", "caption", "transcription", "ground_truth",
                 "target")  # fmt: skip
"""Names that data sets commonly use for the column `text`."""
_VALUE_CHARACTERS = 40  # of a value in a sample row


class ColumnsError(DataError):
    """The columns of a source cannot make rows as the spec maps them."""

    key: str = ""
    """The key of `columns` that should name a column."""
    candidates: tuple[str, ...] = ()
    """The columns that it could name, the likeliest first."""

    def about(self, key: str, candidates: Iterable[str]) -> Self:
        self.key, self.candidates = key, tuple(candidates)
        return self


def check_source(source: DataSource, spec: SourceSpec, data: DataSpec, field: str) -> ReadOptions:
    """Checks the source's first records; returns how they become rows.

    Raises DataError, with a sample row, if the columns cannot make rows, if a column of images
    would be ignored, or if rows of an image and a text have no question.
    """
    options = ReadOptions.of(spec, data)
    if source.builtin:
        return options
    records = sources.head(source)
    present = _column_names(records)
    if not present:
        bad = next((record for record in sources.parsed(source) if record.problem), None)
        raise DataError(
            bad.id if bad else field,
            (bad and bad.problem) or "has no readable record",
            value=spec.uri,
            fix=_unreadable_fix(source, bad.problem if bad else None),
        )
    if _missing_column(options, present) is not None:
        records = sources.head(source, sources.MAX_HEAD_RECORDS)  # later rows may have it
        present = _column_names(records)
        if (missing := _missing_column(options, present)) is not None:
            key, column = missing
            likely = _likely_columns(key, column, options, records, present)
            raise ColumnsError(
                f"{field}.columns.{key}",
                f"there is no column `{column}`; the source has {', '.join(present)}; "
                f"{_show(records[0])}",
                value=spec.uri,
                fix=_suggest_column(key, column, options, records, present),
            ).about(key, _image_columns(records) if key == "image" else likely)
    for record in records:
        _check_record(record, options, field)
    return options


def _unreadable_fix(source: DataSource, problem: str | None) -> str:
    if problem is not None and "UTF-8" in problem:
        return f"save it as UTF-8: iconv -f LATIN1 -t UTF-8 {source.files[0].name} > new"
    return "check the file and `format`"


def _column_names(records: Iterable[Record]) -> tuple[str, ...]:
    names = [name for record in records for name in record.values or ()]
    names += ["text" for record in records if record.text_path]
    return tuple(dict.fromkeys(names))


def _missing_column(options: ReadOptions, present: Sequence[str]) -> tuple[str, str] | None:
    """The key of `columns` and the name of a required column that no record has."""
    spec, names = options.columns, set(present)
    for key, name in asdict(spec).items():
        if name is not None and name not in names:
            return key, name
    mapped = spec.text is not None or spec.question is not None
    if spec.messages or (not mapped and names & {*MESSAGES}):
        return None
    if spec.text is None and not names & {*TEXT}:
        return "text", "text"
    has_question = spec.question or names & {*QUESTION, "input"}
    if not has_question and (options.text_only or (spec.image is None and not names & {*IMAGE})):
        # The instruction asks about an image, so it does not help without one.
        return ("question", "question") if options.text_only else ("image", "image")
    return None


def _check_record(record: Record, options: ReadOptions, field: str) -> None:
    """Raises DataError if records like this one would be rejected or misread."""
    values: Mapping[str, object] = {
        name: without_nulls(value) for name, value in (record.values or {}).items()
    }
    if record.text_path is not None:
        values = {**values, "text": record.text_path}
    try:
        columns = Columns.of(options.columns, values, text_only=options.text_only)
    except AmbiguousColumns as error:
        raise ColumnsError(
            f"{field}.columns.{error.key}",
            f"{error}; {_show(record)}",
            fix=f"name the right one, for example {error.key}: {error.names[0]}",
        ).about(error.key, error.names) from error
    for name in ignored_image_columns(values, columns, options):
        raise ColumnsError(
            f"{field}.columns.image",
            f"column `{name}` contains images but would be ignored; {_show(record)}",
            fix=f"{image_column_fix(name, columns)}, or set data.text_only: true to train on text "
            "only",
        ).about("image", [each for each in (columns.image, name) if each is not None])
    is_pair = columns.text is not None and columns.image is not None
    if is_pair and options.instruction is None and not _has_question(columns, values):
        raise DataError(
            "$.data.instruction",
            f"is required, as rows have no question of their own; {_show(record)}",
            fix='for example instruction: "What does the image say?"; to read questions from a '
            "column, set columns: {question: NAME}",
        )


def _has_question(columns: Columns, values: Mapping[str, object]) -> bool:
    """Whether a record has a question of its own, or messages."""
    asked = columns.question is not None and not is_absent(values[columns.question])
    return columns.messages is not None or asked


def _suggest_column(
    key: str, column: str, options: ReadOptions, records: Sequence[Record], present: Sequence[str]
) -> str:
    """The fix, with the column that is most likely meant."""
    likely = _likely_columns(key, column, options, records, present)
    if likely:
        written = likely[0] if likely[0] == likely[0].strip() else json.dumps(likely[0])
        return f"name the column, for example {key}: {written}"
    if key == "text":
        values = _free_columns(key, options, records, present)
        for name, found in values.items():
            if any(isinstance(v, list) for v in found) and not any(map(looks_like_image, found)):
                return f"`{name}` holds lists: write one answer of a row as `text`"
    return "no column looks like it: check `uri` and `format`"


def _likely_columns(
    key: str, column: str, options: ReadOptions, records: Sequence[Record], present: Sequence[str]
) -> list[str]:
    """The columns that may be meant by `column`, the likeliest first, by names and values."""
    values = _free_columns(key, options, records, present)
    images = [name for name, found in values.items() if any(map(looks_like_image, found))]
    if key == "image":
        candidates = images or list(values)
    else:
        texts = [n for n, found in values.items() if any(isinstance(v, str) for v in found)]
        candidates = [name for name in texts if name not in images]
        candidates.sort(key=lambda name: not any(map(_is_words, values[name])))
    usual = [name for name in candidates if key == "text" and name.lower() in ANSWER_NAMES]
    first = nearest(column, candidates)
    return list(dict.fromkeys([*([first] if first else []), *usual, *candidates]))


def _image_columns(records: Iterable[Record]) -> list[str]:
    found = ((name, value) for record in records for name, value in (record.values or {}).items())
    return list(dict.fromkeys(name for name, value in found if looks_like_image(value)))


def _free_columns(
    key: str, options: ReadOptions, records: Sequence[Record], present: Sequence[str]
) -> dict[str, list[object]]:
    """The columns without a role of their own, with their values."""
    named = (name for name in asdict(options.columns).values() if name)
    used = {"image", "text", "id", "system", "history", *named}
    used |= {*QUESTION, *MESSAGES} if key == "text" else {*TEXT}
    return {
        name: [(r.values or {}).get(name) for r in records] for name in present if name not in used
    }


def _is_words(value: object) -> bool:
    return isinstance(value, str) and not value.strip().isdecimal()


def _show(record: Record) -> str:
    return f"{record.id} is {_struct(record.values or {})}"


def _struct(values: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"{name}: {_value(value)}" for name, value in values.items()) + "}"


def _value(value: object) -> str:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping):
        return _struct(value)
    text = " ".join(redact(str(value)).split())
    return text if len(text) <= _VALUE_CHARACTERS else text[:_VALUE_CHARACTERS] + "…"
