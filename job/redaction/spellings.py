"""Ways a secret may appear in text: its encodings, and lines or strings of it on their own."""

import base64
import html
import json
import re
from collections.abc import Iterator
from urllib.parse import quote, quote_plus

_HEXADECIMAL = re.compile("%[0-9A-F]{2}")
_SHORTEST_PART = 16  # a shorter line or field is not treated as a secret


def spellings(value: str) -> set[str]:
    """The value raw and as encoded in JSON, Python's repr, URLs, HTML and base64."""
    raw = value.encode("utf-8", "surrogateescape")
    quoted = {quote(raw), quote(raw, safe=""), quote_plus(raw)}
    spelled = {
        value,
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
        html.escape(value),
        *quoted,
        *(_HEXADECIMAL.sub(lambda match: match[0].lower(), each) for each in quoted),
    }
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        spelled.add(encode(raw).decode().rstrip("="))
    return spelled


def parts(value: str) -> Iterator[str]:
    """The lines of a multi-line secret, such as a PEM key, and the strings in a JSON secret."""
    lines = value.split("\n")
    for line in lines if len(lines) > 1 else ():
        if len(line) >= _SHORTEST_PART and not line.startswith("-----"):
            yield line
    if value.lstrip().startswith("{"):
        try:
            document = json.loads(value)
        except ValueError:
            return
        for text in _texts(document):
            if len(text) >= _SHORTEST_PART and "://" not in text:
                yield text
                yield from (part for part in parts(text) if not text.startswith("{"))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
