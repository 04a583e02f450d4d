"""Detects text files whose layout does not match their format, and says how to fix them."""

import json
from collections.abc import Sequence
from itertools import takewhile

from job.errors import DataError

_DELIMITERS = ",;\t|"
_ROW_KEYS = ("data", "rows", "train", "examples", "items", "annotations", "records", "instances")


def refuse_first_line(row_id: str, line: bytes) -> None:
    """Raises DataError if the first line shows that a file is not JSON Lines.

    A line that is merely broken becomes a reject later.
    """
    try:
        text = line.decode("utf-8-sig").strip()
        json.loads(text)
    except UnicodeDecodeError:
        return
    except (ValueError, RecursionError):
        pass
    else:
        if text.startswith("["):
            raise DataError(
                row_id, "is an array, but each line must be an object", fix="set `format: json`"
            )
        return
    if "\r" in text:
        what = "has bare carriage returns as line ends, so the whole file is one line"
    elif text == "[":
        what = "begins an array, but each line must be an object"
    elif text.endswith(",") and _is_object(text[:-1]):
        what = "ends with a comma, but each line must be just an object"
    elif text.startswith("{") and text.endswith(("{", "[", ",")):
        what = "does not end its object, but each line must be a complete one"
    else:
        return
    raise DataError(row_id, what, fix="set `format: json`, which accepts this layout")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def refuse_single_object(name: str, value: object) -> None:
    """Raises DataError if a JSON file is one object that contains the rows, or columns of them."""
    if not isinstance(value, dict):
        return
    for key in _ROW_KEYS:
        inner = value.get(key)
        if isinstance(inner, list) and inner and all(isinstance(each, dict) for each in inner):
            raise DataError(
                name,
                f"is one object, whose `{key}` holds {len(inner)} rows",
                fix=f"write only the list: jq .{key} {name} > rows.json",
            )
    lengths = {len(each) if isinstance(each, list) else -1 for each in value.values()}
    if len(value) > 1 and len(lengths) == 1 and lengths.isdisjoint({-1, 0, 1}):
        raise DataError(
            name,
            f"is one object of columns, {', '.join(map(str, value))}, not a list of rows",
            fix='write rows, in pandas: to_json(path, orient="records", lines=True)',
        )


def delimiter_of(first_line: str, format: str) -> str:
    """The delimiter of the header: the format's own, or if absent the most frequent other one."""
    own = "\t" if format == "tsv" else ","
    bare = "".join(first_line.split('"')[::2])  # outside quotes
    if own in bare:
        return own
    most_frequent = max(_DELIMITERS, key=bare.count)
    return most_frequent if most_frequent in bare else own


def column_names(name: str, header: Sequence[str]) -> list[str]:
    """The names of columns; an empty one becomes `column 3`.

    Raises DataError if a name is not UTF-8, or appears twice: one of the columns would be lost.
    """
    names = [each.strip() or f"column {number}" for number, each in enumerate(header, 1)]
    for number, each in enumerate(names):
        if each in names[:number]:
            raise DataError(
                f"{name}:header",
                f"the column `{each}` appears twice",
                fix="give one of the two another name",
            )
        if any("\ud800" <= letter <= "\udfff" for letter in each):
            start = "".join(takewhile(str.isascii, each))
            raise DataError(
                f"{name}:header",
                f"the name of column {number + 1}, which begins with {start!r}, is not UTF-8 text",
                fix="save the list as UTF-8",
            )
    return names
