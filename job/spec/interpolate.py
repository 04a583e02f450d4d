"""`${NAME}` and `${NAME,default}` in text replaced by values from the environment.

A value without quotes that is one variable and nothing else is read as YAML after that, so
`max_steps: ${STEPS,60}` is a number. `$${` stands for `${` itself. A variable that is set but
empty counts as unset where there is a default. A value that is a secret (`redaction` says which
are) stays text and is shown by its variable's name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from job.redaction import (
    add_secret,
    add_secrets_of,
    holds_secret,
    is_secret,
    is_secret_where_read,
    redact,
)
from job.spec.foreign_names import nearest, quoted
from job.spec.keys import Path, at, wants_text
from job.spec.parse import Document, SourceLocation, read_at
from job.spec.problems import Finding

_VARIABLE = re.compile(
    r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?:,(?P<default>[^{}]*))?\}|\$\{"
)


@dataclass(frozen=True)
class Expanded:
    """A document with its variables replaced."""

    document: Document
    shown: Mapping[Path, str] = field(repr=False)
    """Texts to show in place of values: secrets as `${NAME}`, a literal `${` as `$${`."""
    findings: tuple[Finding, ...]


def interpolate(document: Document, environ: Mapping[str, str]) -> Expanded:
    """Replaces every variable; one that is missing is a finding, and its text stays."""
    work = _Work(document.places, environ)
    values = work.expand(document.values, ())
    assert isinstance(values, dict)
    expanded = Document(document.origin, values, document.places)
    return Expanded(expanded, work.shown, tuple(work.findings))


def variables(text: str) -> dict[str, str | None]:
    """The variables that a spec names, each with its default, or None where it has none."""
    found: dict[str, str | None] = {}
    for match in _VARIABLE.finditer(text):
        name, default = match["name"], match["default"]
        if name and found.get(name) is None:
            found[name] = None if default is None else default.strip()
    return found


class _Work:
    def __init__(self, places: Mapping[Path, SourceLocation], environ: Mapping[str, str]) -> None:
        self.places, self.environ = places, environ
        self.shown: dict[Path, str] = {}
        self.findings: list[Finding] = []

    def expand(self, value: Any, path: Path) -> Any:
        if isinstance(value, dict):
            return {key: self.expand(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.expand(inner, (*path, index)) for index, inner in enumerate(value)]
        return self._text(value, path) if isinstance(value, str) and "${" in value else value

    def _text(self, text: str, path: Path) -> Any:
        place = self.places.get(path)
        whole = _VARIABLE.fullmatch(text)
        if whole and whole["name"] and place and place.plain and not self._is_secret(whole, path):
            found = self._look_up(whole, path)
            if found is None:
                return text
            try:
                value = read_at(path, found)
            except ValueError as error:
                self._find(path, f"the value of {whole['name']} {error}", found)
                return text
            if isinstance(value, str):
                self.shown[path] = self._show(whole, found, value, path)
            return value
        before = len(self.findings)
        value = _VARIABLE.sub(lambda match: self._replace(match, path, show=False), text)
        if len(self.findings) > before:
            return text
        self.shown[path] = _VARIABLE.sub(lambda match: self._replace(match, path, show=True), text)
        return value

    def _replace(self, match: re.Match[str], path: Path, *, show: bool) -> str:
        if match[0] == "$${":
            return "$${" if show else "${"
        if match["name"] is None:
            rest = match.string[match.start() :]
            self._find(
                path,
                "holds `${` that opens no variable",
                rest,
                "write ${NAME} or ${NAME,default}, or $${ for the characters themselves",
            )
            return match[0]
        value = self._look_up(match, path)
        if value is None:
            return match[0]
        if not show:
            return value
        return self._show(match, value, value, path)

    def _value(self, match: re.Match[str]) -> str | None:
        """The variable's value, or its default where it is unset or empty; None without either."""
        default = match["default"]
        return self.environ.get(match["name"]) or (
            self.environ.get(match["name"]) if default is None else str(default).strip()
        )

    def _is_secret(self, match: re.Match[str], path: Path) -> bool:
        name, value = match["name"], self._value(match) or ""
        if not self.environ.get(name) or _takes_no_free_text(path, value):
            return is_secret(name, value)
        return is_secret_where_read(name, value)

    def _show(self, match: re.Match[str], value: str, read: str, path: Path) -> str:
        """What was `read` of the value as it may be shown: by the variable's name if secret."""
        name = match["name"]
        # A default is written in the spec, and must load again where no variable is set; only what
        # would be masked wherever it is written is not shown.
        secret = redact(value) != value
        if self.environ.get(name):
            free = not _takes_no_free_text(path, value)
            secret |= holds_secret(name, value) if free else is_secret(name, value)
        return "${" + name + "}" if secret else _escape(read)

    def _look_up(self, match: re.Match[str], path: Path) -> str | None:
        name = match["name"]
        value = self._value(match)
        if value is None:
            close = nearest(name, self.environ)
            self._find(
                path,
                f"the environment variable {name} is not set",
                match[0],
                f"export {name}=…, or give a default: ${{{name},value}}"
                + (f"; {close} is set" if close else ""),
            )
            return None
        if self._is_secret(match, path):
            add_secret(name, value)
        else:
            add_secrets_of(value)
        return value

    def _find(self, path: Path, message: str, value: str, fix: str | None = None) -> None:
        finding = Finding(path, message, fix, quoted(value))
        if finding not in self.findings:
            self.findings.append(finding)


def _takes_no_free_text(path: Path, value: str) -> bool:
    """Whether the key takes numbers or lists, or the value is one of the few that it takes."""
    node = at(path)
    return node is not None and (not wants_text(path) or value in node.get("enum", ()))


def _escape(text: str) -> str:
    return text.replace("${", "$${")
