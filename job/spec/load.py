"""Loads a spec: parse, override, interpolate, validate, resolve."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from job.errors import SpecError
from job.redaction import CONTROL, add_secrets_of, redact
from job.spec.core_yaml import CoreLoader
from job.spec.interpolate import Expanded, interpolate
from job.spec.keys import Json, Path
from job.spec.overrides import Override, override
from job.spec.parse import parse
from job.spec.resolve import build, changed, fill
from job.spec.types import JobSpec
from job.spec.validate import problems


@dataclass(frozen=True)
class LoadedSpec:
    """A valid spec, with its values for display."""

    spec: JobSpec
    resolved: dict[str, Any]
    """Every key with its value in spec notation: secrets as `${NAME}`, `${` as `$${`."""
    changed: tuple[str, ...]
    """The dotted keys whose values differ from the defaults, in schema order."""


def load_spec(
    text: str,
    origin: str,
    overrides: Sequence[Override] = (),
    environ: Mapping[str, str] = os.environ,
) -> LoadedSpec:
    """Loads the spec in `text`; `origin` is its name in messages.

    Use `parse.decode` to decode bytes. Raises SpecError listing every problem, and UsageError for
    an override without `=`.
    """
    document, misplaced = override(parse(text, origin), overrides)
    expanded = interpolate(document, environ)
    document = expanded.document
    _register_secrets(document.values)
    shown = _shown(expanded, document.values)
    every_problem = problems(document, shown=shown, known=(*misplaced, *expanded.findings))
    if every_problem:
        raise SpecError.from_problems(every_problem)
    assert isinstance(shown, dict)
    resolved = fill(shown)
    return LoadedSpec(build(fill(document.values)), resolved, tuple(changed(resolved)))


def dump_resolved(loaded: LoadedSpec) -> str:
    """The resolved spec as YAML. Loading it gives the same job, except for secrets."""
    body = yaml.dump(
        loaded.resolved, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )
    # Text with control characters is double-quoted (see `_represent_text`), so escapes work.
    body = CONTROL.sub(lambda match: _escaped(match[0]), body)
    return f"# The spec as run: every key, with defaults for unset ones.\n{body}"


def dump_scalar(text: str) -> str:
    """Text as a YAML scalar on one line, quoted if needed, with `${` escaped."""
    style = '"' if CONTROL.search(text) or "\n" in text else None
    body = yaml.dump(
        text.replace("${", "$${"), Dumper=_Dumper, default_style=style, allow_unicode=True,
        width=float("inf"),
    )  # fmt: skip
    body = body.removesuffix("...\n").strip("\n")
    return CONTROL.sub(lambda match: _escaped(match[0]), body)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # In unquoted text, PyYAML does not read some line breaks back as it wrote them.
    style = '"' if CONTROL.search(text.replace("\n", "")) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)
for _first, _resolvers in CoreLoader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _resolvers:
        _Dumper.add_implicit_resolver(_tag, _pattern, [_first])


def _escaped(character: str) -> str:
    if character == "\n":
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _register_secrets(value: Json) -> None:
    """Registers the passwords and signatures in the spec's URIs for redaction."""
    if isinstance(value, str):
        add_secrets_of(value)
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _register_secrets(inner)


def _shown(expanded: Expanded, value: Json, path: Path = ()) -> Json:
    if isinstance(value, dict):
        return {name: _shown(expanded, inner, (*path, name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shown(expanded, inner, (*path, index)) for index, inner in enumerate(value)]
    return redact(expanded.shown.get(path, value)) if isinstance(value, str) else value
