"""Model families; `bind` finds the one that a checkpoint belongs to.

Imports: spec, storage, local, prep.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import storage
from job.errors import InputError, JobError, SpecError
from job.families import model_source
from job.families.base import Checkpoint, Family
from job.families.ernie45_vl import Ernie45VL
from job.families.llm import Llm
from job.families.vlm import Vlm
from job.spec.types import DataSpec, ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES: tuple[type[Family], ...] = (Ernie45VL, Vlm, Llm)
"""The first that recognises a checkpoint takes it."""


def read_checkpoint(uri: str, directory: Path) -> Checkpoint:
    """The checkpoint in `directory`.

    Raises InputError where there is no readable `config.json`.
    """
    if not (directory / "config.json").is_file():
        raise InputError(uri, "holds no config.json", fix="name a model's folder")
    return Checkpoint(uri=uri, directory=directory, config=_config(uri, str(directory)))


def control_tokens(uri: str, directory: Path, model: ModelSpec) -> tuple[str, ...]:
    """What no text may hold for the checkpoint in `directory`, which needs no weights; sorted.

    Raises InputError if its files cannot be read, and SpecError if no family knows it.
    """
    family = _family(uri, _config(uri, str(directory)), model)
    return tuple(sorted(family.control_tokens(directory)))


def is_known(uri: str) -> bool:
    """Whether a family knows the checkpoint's configuration by its name."""
    return any(family.known(uri) for family in FAMILIES)


def expected(model: ModelSpec) -> type[Family] | None:
    """The family, as far as the spec and what lies on this machine tell."""
    uri = model.model_name_or_path
    if model.family != "auto":
        return _family(uri, {}, model)
    if not storage.is_local(model_source.place(uri)) and not is_known(uri):
        return None
    try:
        return find(model)[0]
    except JobError:  # whoever reads the model says what is wrong with it
        return None


def bind(checkpoint: Checkpoint, model: ModelSpec, data: DataSpec) -> Family:
    """The checkpoint's family, by the spec or by its `config.json`."""
    return _family(checkpoint.uri, checkpoint.config, model).bind(checkpoint, data)


def find(model: ModelSpec) -> tuple[type[Family], dict[str, Any]]:
    """The model's family and configuration; of the checkpoint only `config.json` is read.

    Raises InputError where that cannot be read, and SpecError where no family knows it.
    """
    uri = model.model_name_or_path
    known = (family.known(uri) for family in FAMILIES)
    config = next(filter(None, known), None) or _config(uri, model_source.place(uri))
    return _family(uri, config, model), config


def architecture(model: ModelSpec) -> "tuple[type[Family], PreTrainedModel]":
    """The model's family and its architecture on the meta device. Raises what `find` does."""
    family, config = find(model)
    return family, family.architecture(model.model_name_or_path, config)


def _family(uri: str, config: dict[str, Any], model: ModelSpec) -> type[Family]:
    known = {family.name: family for family in FAMILIES}
    if model.family != "auto":
        return known[model.family]
    for family in FAMILIES:
        if family.recognises(config):
            return family
    raise SpecError(
        "$.model.model_name_or_path",
        f"its model_type {config.get('model_type')!r} belongs to no family known here",
        value=uri,
        fix=f"known families: {', '.join(known)}; or name one in model.family",
    )


def _config(uri: str, place: str) -> dict[str, Any]:
    try:
        config = json.loads(storage.read_text(storage.join(place, "config.json")))
    except ValueError as error:
        raise InputError(uri, f"its config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(uri, "its config.json holds no object")
    return config
