"""Reading a spec: parse, override, interpolate, validate, resolve, each a step of its own."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from job.errors import SpecError
from job.redaction import CONTROL, add_secrets_of, redact
from job.spec.core_yaml import CoreLoader
from job.spec.interpolate import Expanded, interpolate
from job.spec.keys import Path
from job.spec.overrides import Override, override
from job.spec.parse import parse
from job.spec.resolve import build, changed, fill
from job.spec.types import JobSpec
from job.spec.validate import problems


@dataclass(frozen=True)
class LoadedSpec:
    """A spec that is valid, with what there is to show of it."""

    spec: JobSpec
    resolved: dict[str, Any]
    """Every key with its value, as a spec would say it: secrets as `${NAME}`, `${` as `$${`."""
    changed: tuple[str, ...]
    """The dotted keys whose values are not the defaults, in the schema's order."""


def load_spec(
    text: str,
    origin: str,
    overrides: Sequence[Override] = (),
    environ: Mapping[str, str] = os.environ,
) -> LoadedSpec:
    """The job that `text` describes; `origin` is what messages call it.

    Bytes become text by `parse.decode`. Raises SpecError with every problem found, and
    UsageError for an override without `=`.
    """
    document, misplaced = override(parse(text, origin), overrides)
    expanded = interpolate(document, environ)
    document = expanded.document
    _know_secrets_of(document.values)
    shown = _shown(expanded, document.values)
    found = problems(document, shown=shown, known=(*misplaced, *expanded.findings))
    if found:
        raise SpecError.from_problems(found)
    resolved = fill(shown)
    return LoadedSpec(build(fill(document.values)), resolved, tuple(changed(resolved)))


def dump_resolved(loaded: LoadedSpec) -> str:
    """The spec as run, as YAML: it loads as the same job where it holds no secrets."""
    body = yaml.dump(
        loaded.resolved, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )
    # Texts that hold such characters are in double quotes, where YAML spells them so.
    body = CONTROL.sub(lambda found: _spelled(found[0]), body)
    return f"# The spec as run: every key, with its default where none was given.\n{body}"


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would read as something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes some line breaks bare unless it is told to quote, and reads them as others.
    style = '"' if CONTROL.search(text.replace("\n", "")) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)
for _first, _resolvers in CoreLoader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _resolvers:
        _Dumper.add_implicit_resolver(_tag, _pattern, [_first])


def _spelled(character: str) -> str:
    if character == "\n":
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _know_secrets_of(value: Any) -> None:
    """Has the passwords and signatures in the spec's URIs known wherever they are written."""
    if isinstance(value, str):
        add_secrets_of(value)
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _know_secrets_of(inner)


def _shown(expanded: Expanded, value: Any, path: Path = ()) -> Any:
    if isinstance(value, dict):
        return {name: _shown(expanded, inner, (*path, name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shown(expanded, inner, (*path, index)) for index, inner in enumerate(value)]
    return redact(expanded.shown.get(path, value)) if isinstance(value, str) else value
