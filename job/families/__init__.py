"""Model families: everything that is specific to a model architecture or checkpoint layout.

Imports: spec, storage, local, prep.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import storage
from job.errors import DataError, InputError, JobError, SpecError
from job.families import chat_template, model_source
from job.families.base import Checkpoint, Family
from job.families.ernie45_vl import Ernie45VL
from job.families.llm import Llm
from job.families.vlm import Vlm
from job.spec.types import DataSpec, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES: tuple[type[Family], ...] = (Ernie45VL, Vlm, Llm)
"""In order of precedence: a checkpoint belongs to the first that recognizes it."""


def read_checkpoint(uri: str, directory: Path) -> Checkpoint:
    """The checkpoint in `directory`. Raises InputError if it has no readable `config.json`."""
    if not (directory / "config.json").is_file():
        raise InputError(uri, "holds no config.json", fix="use the folder of a model")
    return Checkpoint(uri=uri, directory=directory, config=_config(uri, str(directory)))


def control_tokens(uri: str, directory: Path, model: ModelSpec) -> tuple[str, ...]:
    """The control tokens that no row may contain, sorted; `directory` needs no weights.

    Raises InputError if its files cannot be read, and SpecError if it belongs to no family.
    """
    return tuple(sorted(of_checkpoint(uri, directory, model).control_tokens(directory)))


def of_checkpoint(uri: str, directory: Path, model: ModelSpec) -> type[Family]:
    """The family of the spec or of the `config.json` in `directory`, which needs no weights.

    Raises InputError if that cannot be read, and SpecError if it belongs to no family.
    """
    return _family(uri, _config(uri, str(directory)), model)


def is_known(uri: str) -> bool:
    """Whether the checkpoint's configuration is known from its URI, without a download."""
    return any(family.known_config(uri) for family in FAMILIES)


def resolve_offline(model: ModelSpec) -> type[Family] | None:
    """The family, if the spec and local files suffice to determine it; else None."""
    uri = model.model_name_or_path
    if model.family != "auto":
        return _family(uri, {}, model)
    if not storage.is_local(model_source.location(uri)) and not is_known(uri):
        return None
    try:
        return resolve(model)[0]
    except JobError:  # reported when the model is read
        return None


def bind(checkpoint: Checkpoint, model: ModelSpec, data: DataSpec) -> Family:
    """The family of the spec or of the checkpoint's `config.json`, bound to the checkpoint.

    Uses the spec's chat template, if it has one. Raises SpecError if that cannot be used, or if the
    template has no place for `data.system`.
    """
    family = _family(checkpoint.uri, checkpoint.config, model)
    template = chat_template.text_of(model)
    if template is None:
        bound = family.bind(checkpoint, data)
    else:
        with _as_problem_of(chat_template.FIELD, "cannot be used", chat_template.NEEDED):
            bound = family.bind(replace(checkpoint, chat_template=template), data)
            bound.require_chat_template()
    if data.system is not None:
        fix = (
            "remove the line and put its text into data.instruction, or set model.chat_template to "
            "a template with a system role"
        )
        with _as_problem_of("$.data.system", "the model does not see it", fix):
            bound.require_system_role(data.system)
    return bound


@contextmanager
def _as_problem_of(field: str, what: str, fix: str) -> Iterator[None]:
    """Raises a DataError inside as a SpecError of the field: no row is at fault."""
    try:
        yield
    except DataError as error:
        raise SpecError(field, f"{what}: {error.problems[0].message}", fix=fix) from error


def resolve(model: ModelSpec) -> tuple[type[Family], dict[str, Any]]:
    """The model's family and configuration; reads `config.json` only.

    Raises InputError if that cannot be read, and SpecError if it belongs to no family.
    """
    uri = model.model_name_or_path
    known = (family.known_config(uri) for family in FAMILIES)
    config = next(filter(None, known), None) or _config(uri, model_source.location(uri))
    return _family(uri, config, model), config


def architecture(model: ModelSpec) -> "tuple[type[Family], PreTrainedModel]":
    """The family, and the model on the meta device. Raises the errors of `resolve`."""
    family, config = resolve(model)
    return family, family.architecture(model.model_name_or_path, config)


def _family(uri: str, config: dict[str, Any], model: ModelSpec) -> type[Family]:
    known = {family.name: family for family in FAMILIES}
    if model.family != "auto":
        return known[model.family]
    for family in FAMILIES:
        if family.recognizes(config):
            return family
    raise SpecError(
        "$.model.model_name_or_path",
        f"its model_type {config.get('model_type')!r} belongs to no known family",
        value=uri,
        fix=f"use a model of one of the families {', '.join(known)}, or set model.family",
    )


def _config(uri: str, location: str) -> dict[str, Any]:
    try:
        config = storage.parse_json(storage.read_text(storage.join(location, "config.json")))
    except ValueError as error:
        raise InputError(uri, f"its config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(uri, "its config.json is not a JSON object")
    return config
