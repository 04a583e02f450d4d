"""YAML 1.2 (core schema) on top of PyYAML: `2e-4` is a number and `on` is text."""

import re

import yaml

from job.errors import SpecError
from job.spec.keys import Json

TAG = "tag:yaml.org,2002:"
_CORE = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)
_LONGEST_NUMBER = 64  # longer numbers stay text: Python refuses to parse or print very long ones

_FIXES = {
    "mapping values are not allowed here": "put the value in quotes: it contains `: `",
    "found unexpected end of stream": "close the quote that opens before this position",
    "could not find expected ':'": "write `key: value`, with a colon and a space",
}


class CoreLoader(yaml.SafeLoader):
    """Composes nodes with the tags of YAML 1.2."""


CoreLoader.yaml_implicit_resolvers = {}  # drop the YAML 1.1 resolvers of the base class
for _name, _pattern, _first in _CORE:
    CoreLoader.add_implicit_resolver(
        TAG + _name,
        re.compile(rf"(?:{_pattern})\Z"),
        [*_first, ""] if _name == "null" else list(_first),
    )


def compose(text: str, origin: str) -> yaml.Node | None:
    """Parses one document to nodes. Raises SpecError with line and column for invalid YAML."""
    try:
        return CoreLoader(text).get_single_node()
    except yaml.reader.ReaderError as error:
        raise SpecError(
            position(origin, text, error.position),
            f"contains the character U+{error.character:04X}, which YAML does not allow",
            fix="remove it, or write it as an escape in double quotes",
        ) from None
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(error, text, origin) from None
    except RecursionError:
        raise SpecError(origin, "is nested too deeply") from None
    except (ValueError, OverflowError):  # an escape such as "\U00110000"
        raise SpecError(
            origin, "is not valid YAML: an escape is not a character", fix="fix the escape"
        ) from None


def construct(kind: str, text: str) -> Json:
    """The value of a scalar. Raises KeyError for an unknown kind, ValueError for invalid text."""
    if kind in ("int", "float") and len(text) > _LONGEST_NUMBER:
        return text
    return {
        "null": lambda: None,
        "bool": lambda: text.lower() == "true",
        "int": lambda: int(text, 0) if text[:2] in ("0o", "0x") else int(text),
        "float": lambda: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
        # JSON writes 😀 as two escapes, which PyYAML keeps as two surrogates.
        "str": lambda: text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"),
    }[kind]()


def plain(text: str) -> Json:
    """The value of an unquoted scalar."""
    for name, pattern, _ in _CORE:
        if re.fullmatch(pattern, text):
            return construct(name, text)
    return text


def _not_yaml(error: yaml.MarkedYAMLError, text: str, origin: str) -> SpecError:
    mark = error.problem_mark or error.context_mark
    location = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
    problem = error.problem or "it cannot be read"
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "expected a single document" in (error.context or ""):
        return SpecError(
            location, "contains more than one YAML document", fix="put each job in its own file"
        )
    if "\\t" in problem or (mark and line[mark.column : mark.column + 1] == "\t"):
        return SpecError(location, "contains a tab where YAML allows only spaces", fix="use spaces")
    if problem.startswith("found undefined alias"):
        fix = "put the anchor (&name) before the alias, or put the value in quotes"
    elif "${" in line and "," in problem:
        fix = "put ${…} in quotes inside [ ] or { }"
    else:
        fix = _FIXES.get(problem, "fix the YAML at this position")
    return SpecError(location, f"is not valid YAML: {problem}", value=line.strip() or None, fix=fix)


def position(origin: str, text: str, index: int) -> str:
    """The position of the character at `index`, as `origin:line:column`."""
    before = text[:index]
    column = index - (before.rfind("\n") + 1) + 1
    return f"{origin}:{before.count(chr(10)) + 1}:{column}"
