"""Escapes control characters in text from data, models and servers.

Escapes everything that can move the cursor, change colours or titles, open links, end a line or
reverse text: C0 and C1 controls, line separators, bidirectional marks. Characters that only affect
rendering, such as the ideographic space or the joiners of emoji, stay.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar, cast

T = TypeVar("T")

# Controls, line separators, surrogates, bidirectional marks, tags, and invisible characters.
CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters and line ends escaped (`\\x1b`, `\\u2028`), except `keep`."""
    if text.isprintable():
        return text
    return CONTROL.sub(lambda match: match[0] if match[0] in keep else _escaped(match[0]), text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def json_text(
    value: object, *, indent: int | None = None, default: Callable[[object], object] | None = None
) -> str:
    """`value` as readable JSON, with control characters escaped as `\\u009b`.

    NaN and infinity, which JSON lacks, become null.
    """
    dump = partial(json.dumps, indent=indent, ensure_ascii=False, default=default, allow_nan=False)
    try:
        text = dump(value)
    except ValueError:
        text = dump(_map_leaves(value, _or_null))
    if text.isprintable():
        return text
    return CONTROL.sub(lambda match: match[0] if match[0] == "\n" else _in_json(match[0]), text)


def _or_null(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _in_json(character: str) -> str:
    return json.dumps(character)[1:-1]


def map_texts(value: T, change: Callable[[str], str]) -> T:
    """Applies `change` to all texts in `value`, at any depth, but not to mapping keys.

    Tuples become lists, as in JSON.
    """
    changed = _map_leaves(value, lambda leaf: change(leaf) if isinstance(leaf, str) else leaf)
    return cast(T, changed)


def _map_leaves(value: object, change: Callable[[object], object]) -> object:
    match value:
        case Mapping():
            return {key: _map_leaves(inner, change) for key, inner in value.items()}
        case list() | tuple():
            return [_map_leaves(inner, change) for inner in value]
    return change(value)
