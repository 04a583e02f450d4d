"""Lists that are not laid out as their format says: found at their beginning, with the way out."""

import json
from collections.abc import Sequence
from itertools import takewhile

from job.errors import DataError

_DELIMITERS = ",;\t|"
_HELD_IN = ("data", "rows", "train", "examples", "items", "annotations", "records", "instances")


def refuse_first_line(row_id: str, line: bytes) -> None:
    """Raises DataError if the first line of a list of JSON lines shows that it is none.

    A line that is merely broken is left to be refused alone.
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
                row_id, "is an array, where each line must be an object", fix="set `format: json`"
            )
        return
    if "\r" in text:
        what = "ends lines by carriage returns alone, so that all of the file is one line"
    elif text == "[":
        what = "begins an array, where each line must be an object"
    elif text.endswith(",") and _is_object(text[:-1]):
        what = "ends with a comma, where each line must be an object alone"
    elif text.startswith("{") and text.endswith(("{", "[", ",")):
        what = "does not end its object, where each line must be a whole one"
    else:
        return
    raise DataError(row_id, what, fix="set `format: json`, which reads it as it is")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def refuse_one_object(name: str, value: object) -> None:
    """Raises DataError if a file of JSON is one object that holds the rows, or columns of them."""
    if not isinstance(value, dict):
        return
    for key in _HELD_IN:
        inner = value.get(key)
        if isinstance(inner, list) and inner and all(isinstance(each, dict) for each in inner):
            raise DataError(
                name,
                f"is one object, whose `{key}` holds {len(inner)} rows",
                fix=f"write the list alone: jq .{key} {name} > rows.json",
            )
    lengths = {len(each) if isinstance(each, list) else -1 for each in value.values()}
    if len(value) > 1 and len(lengths) == 1 and lengths.isdisjoint({-1, 0, 1}):
        raise DataError(
            name,
            f"is one object of columns, {', '.join(map(str, value))}, and not a list of rows",
            fix='write rows, in pandas: to_json(path, orient="records", lines=True)',
        )


def delimiter_of(first_line: str, format: str) -> str:
    """What parts the names: the format's own delimiter, or if it has none the most frequent one."""
    own = "\t" if format == "tsv" else ","
    bare = "".join(first_line.split('"')[::2])  # outside quotes
    if own in bare:
        return own
    most = max(_DELIMITERS, key=bare.count)
    return most if most in bare else own


def names_of(name: str, given: Sequence[str]) -> list[str]:
    """The names of columns, those without one numbered.

    Raises DataError if a name stands twice, for one of the two would be lost, or is no UTF-8.
    """
    names = [each.strip() or f"column {number}" for number, each in enumerate(given, 1)]
    for number, each in enumerate(names):
        if each in names[:number]:
            raise DataError(
                f"{name}:header",
                f"the column `{each}` stands twice",
                fix="give one of the two another name",
            )
        if any("\ud800" <= letter <= "\udfff" for letter in each):
            shown = "".join(takewhile(str.isascii, each))
            raise DataError(
                f"{name}:header",
                f"the name of column {number + 1}, which begins with {shown!r}, is not UTF-8 text",
                fix="save the list as UTF-8",
            )
    return names
