"""Replaces `${NAME}` and `${NAME,default}` in text with values of environment variables.

If a value is a single unquoted variable, the variable's value is parsed as YAML, so
`max_steps: ${STEPS,60}` is a number. `$${` is a literal `${`. With a default, an empty variable
counts as unset. A secret (see `redaction`) always stays text and is displayed as `${NAME}`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from job.redaction import (
    add_secret,
    add_secrets_of,
    holds_secret,
    is_secret,
    is_secret_in_spec,
    redact,
)
from job.spec.foreign_names import nearest, quoted
from job.spec.keys import Json, Path, at, wants_text
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
    """Texts to display instead of values: secrets as `${NAME}`, a literal `${` as `$${`."""
    findings: tuple[Finding, ...]


def interpolate(document: Document, environ: Mapping[str, str]) -> Expanded:
    """Replaces every variable; a missing one stays in the text and is reported as a finding."""
    expander = _Expander(document.locations, environ)
    values = expander.expand(document.values, ())
    assert isinstance(values, dict)
    expanded = Document(document.origin, values, document.locations)
    return Expanded(expanded, expander.shown, tuple(expander.findings))


def variables(text: str) -> dict[str, str | None]:
    """The variables used in a spec, with their defaults (None: no default)."""
    defaults: dict[str, str | None] = {}
    for match in _VARIABLE.finditer(text):
        name, default = match["name"], match["default"]
        if name and defaults.get(name) is None:
            defaults[name] = None if default is None else default.strip()
    return defaults


class _Expander:
    def __init__(
        self, locations: Mapping[Path, SourceLocation], environ: Mapping[str, str]
    ) -> None:
        self.locations, self.environ = locations, environ
        self.shown: dict[Path, str] = {}
        self.findings: list[Finding] = []

    def expand(self, value: Json, path: Path) -> Json:
        if isinstance(value, dict):
            return {key: self.expand(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.expand(inner, (*path, index)) for index, inner in enumerate(value)]
        return self._text(value, path) if isinstance(value, str) and "${" in value else value

    def _text(self, text: str, path: Path) -> Json:
        location = self.locations.get(path)
        whole = _VARIABLE.fullmatch(text)
        unquoted = location is not None and location.plain
        if whole and whole["name"] and unquoted and not self._is_secret(whole, path):
            content = self._look_up(whole, path)
            if content is None:
                return text
            try:
                parsed = read_at(path, content)
            except ValueError as error:
                self._report(path, f"the value of {whole['name']} {error}", content)
                return text
            if isinstance(parsed, str):
                self.shown[path] = self._show(whole, content, parsed, path)
            return parsed
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
            self._report(
                path,
                "contains `${` without a variable",
                rest,
                "write ${NAME} or ${NAME,default}, or $${ for a literal ${",
            )
            return match[0]
        value = self._look_up(match, path)
        if value is None:
            return match[0]
        if not show:
            return value
        return self._show(match, value, value, path)

    def _value(self, match: re.Match[str]) -> str | None:
        """The variable's value, or its default if it is unset or empty; None without either."""
        default = match["default"]
        return self.environ.get(match["name"]) or (
            self.environ.get(match["name"]) if default is None else str(default).strip()
        )

    def _is_secret(self, match: re.Match[str], path: Path) -> bool:
        name, value = match["name"], self._value(match) or ""
        if not self.environ.get(name) or _takes_no_free_text(path, value):
            return is_secret(name, value)
        return is_secret_in_spec(name, value)

    def _show(self, match: re.Match[str], value: str, read: str, path: Path) -> str:
        """The text to display for `read`, which came from `value`: `${NAME}` for a secret."""
        name = match["name"]
        # A default is part of the spec, and the displayed spec must load without the variable. So a
        # default is hidden only if redaction would mask it anywhere.
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
            self._report(
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

    def _report(self, path: Path, message: str, value: str, fix: str | None = None) -> None:
        finding = Finding(path, message, fix, quoted(value))
        if finding not in self.findings:
            self.findings.append(finding)


def _takes_no_free_text(path: Path, value: str) -> bool:
    """Whether the key takes no arbitrary text, or the value is one of its choices."""
    node = at(path)
    return node is not None and (not wants_text(path) or value in node.get("enum", ()))


def _escape(text: str) -> str:
    return text.replace("${", "$${")
