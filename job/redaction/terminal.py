"""What comes from data, models and servers steers no terminal: control characters are written out.

Written out is what moves the cursor, changes colours or titles, opens links, ends a line or turns
the text around: C0 and C1 controls, line separators, and marks of direction. What only shows, such
as the wide space of Chinese and Japanese text or the joiners of emoji, stays.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

# Controls, separators of lines, surrogates, marks of direction, tags, and what shows nothing.
STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str, keep: str = "") -> str:
    """`text` with what would steer a terminal or end a line written out: `\\x1b`, `\\u2028`."""
    if text.isprintable():
        return text
    return STEERING.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def json_text(
    value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None
) -> str:
    """`value` as JSON that is readable and steers no terminal: such characters as `\\u009b`."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=default)
    if text.isprintable():
        return text
    return STEERING.sub(lambda found: found[0] if found[0] == "\n" else _in_json(found[0]), text)


def _in_json(character: str) -> str:
    return json.dumps(character)[1:-1]


def texts_in(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with its texts changed: in lists and mappings too, but for their keys."""
    match value:
        case str():
            return change(value)
        case Mapping():
            return {key: texts_in(inner, change) for key, inner in value.items()}
        case list() | tuple():
            return [texts_in(inner, change) for inner in value]
        case _:
            return value
