"""The arguments and options that commands share, and loading of the spec."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from job.cli import completion

if TYPE_CHECKING:
    from job.spec.load import LoadedSpec
    from job.spec.overrides import Override

SPEC = typer.Argument(help="The spec: a YAML file, by path or URI.", metavar="SPEC")

Spec = Annotated[str, SPEC]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a key of the spec. Repeatable.",
        metavar="KEY=VALUE",
        autocompletion=completion.overrides,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="Any adapter for the spec's model, by path or URI, instead of the one at the output.",
        metavar="URI",
    ),
]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", help="Where results go (overrides output.uri).", metavar="URI"),
]


def load(spec: str, overrides: "Sequence[Override] | None", output: str | None) -> "LoadedSpec":
    """Reads and checks the spec with its overrides."""
    from job import storage
    from job.spec.load import load_spec
    from job.spec.overrides import with_output
    from job.spec.parse import MAX_BYTES, decode

    text = decode(storage.read_bytes(spec, MAX_BYTES + 1), spec)
    return load_spec(text, spec, with_output(overrides or (), output))


def overrides_from(options: Mapping[str, tuple[str, object]]) -> "list[Override]":
    """The overrides for options that stand for a spec key; a value of None means not given."""
    from job.spec.overrides import KeyValue

    return [
        KeyValue(option, key, value if isinstance(value, str) else json.dumps(value))
        for option, (key, value) in options.items()
        if value is not None
    ]
