"""Model families; `bind` finds the one that a checkpoint belongs to."""

import json
from pathlib import Path

from job.errors import InputError, SpecError
from job.families.base import Checkpoint, Family
from job.families.ernie45_vl import Ernie45VL
from job.spec.types import DataSpec, ModelSpec

FAMILIES: tuple[type[Ernie45VL], ...] = (Ernie45VL,)


def read_checkpoint(uri: str, directory: Path) -> Checkpoint:
    """The checkpoint in `directory`.

    Raises InputError where there is no readable `config.json`.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(uri, "holds no config.json", fix="name a model's folder") from error
    except ValueError as error:
        raise InputError(uri, f"its config.json is not JSON: {error}") from error
    return Checkpoint(uri=uri, directory=directory, config=config)


def expected(model: ModelSpec) -> type[Ernie45VL] | None:
    """The family, as far as the spec alone tells: it names one, or only one is known."""
    known = [f for f in FAMILIES if model.family in ("auto", f.name)]
    return known[0] if len(known) == 1 else None


def bind(checkpoint: Checkpoint, model: ModelSpec, data: DataSpec) -> Family:
    """The checkpoint's family, by the spec or by its `model_type`."""
    known = {family.name: family for family in FAMILIES}
    if model.family != "auto":
        return known[model.family].bind(checkpoint, data)
    for family in FAMILIES:
        if family.recognises(checkpoint.config):
            return family.bind(checkpoint, data)
    raise SpecError(
        "$.model.model_name_or_path",
        f"its model_type {checkpoint.config.get('model_type')!r} belongs to no family known here",
        value=checkpoint.uri,
        fix=f"known families: {', '.join(known)}; or name one in model.family",
    )
