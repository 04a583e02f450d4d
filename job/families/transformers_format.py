"""Checkpoints as Transformers itself lays them out: configurations, weights, and their names."""

import copy
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job import log
from job.errors import InputError, SpecError
from job.families import weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_WRAPPER = re.compile(r"\.base_layer\b")


def configuration(auto: Any, uri: str, config: dict[str, Any]) -> Any:
    """The configuration of a model that `auto` makes, as Transformers has it.

    Raises SpecError where it makes no such model, and InputError where weights are stored
    quantized, which a merge would have to undo.
    """
    from transformers import CONFIG_MAPPING

    if "quantization_config" in config:
        raise InputError(
            uri, "holds quantized weights", fix="name the checkpoint that they were made from"
        )
    kind = config.get("model_type")
    try:
        found = CONFIG_MAPPING[kind]
    except KeyError:
        found = None
    if found is None or found not in auto._model_mapping:
        raise SpecError(
            "$.model.model_name_or_path",
            f"its model_type {kind!r} belongs to no family known here: {auto.__name__} of "
            "Transformers does not make it",
            value=uri,
        )
    return found.from_dict(copy.deepcopy(config))


def load(
    auto: Any,
    uri: str,
    directory: Path,
    *,
    dtype: "torch.dtype",
    device: "torch.device",
    **kwargs: Any,
) -> "PreTrainedModel":
    """The checkpoint's model, in evaluation mode.

    Raises InputError where files or tensors are missing or of another shape.
    """
    weight_files.shapes(uri, directory)  # no file is missing or cut off
    try:
        model, found = auto.from_pretrained(
            directory,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **kwargs,
        )
    except ValueError as error:  # an attention that the model has not, say
        raise InputError(uri, f"Transformers cannot load it: {error}") from error
    misshapen = [name for name, *_ in found["mismatched_keys"]]
    for names, what in ((found["missing_keys"], "are missing"), (misshapen, "are misshapen")):
        if names:
            raise InputError(
                uri,
                f"{len(names)} tensors of its config.json {what}: "
                f"{weight_files.first(sorted(names))}",
                fix="check that the checkpoint was copied whole and belongs to its config.json",
            )
    if superfluous := sorted(found["unexpected_keys"]):
        log.warn(
            "tensors of the checkpoint that its architecture has not: merged/ lacks them",
            count=len(superfluous),
            names=weight_files.first(superfluous),
        )
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def write_config(config: dict[str, Any], directory: Path, dtype: "torch.dtype") -> None:
    """Writes `config.json` as the checkpoint had it, but for the dtype of the weights."""
    name = str(dtype).removeprefix("torch.")
    written = _of_dtype(config, name)
    for section in ("text_config", "vision_config"):
        if isinstance(written.get(section), dict):
            written[section] = _of_dtype(written[section], name)
    path = directory / "config.json"
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def stored(
    model: "PreTrainedModel", tensors: "Iterable[tuple[str, torch.Tensor]]"
) -> "Iterator[tuple[str, torch.Tensor]]":
    """The tensors under the names of published checkpoints, with the buffers that those hold.

    Each is converted by itself, so that no second copy of the model is in memory; all at once only
    where the checkpoint holds several of them as one.
    """
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    conversions = getattr(model, "_weight_conversions", None) or ()
    joined = any(isinstance(c, WeightConverter) and len(c.target_patterns) > 1 for c in conversions)
    named = itertools.chain(tensors, _buffers(model))
    pieces = (dict([pair]) for pair in named)
    for piece in [dict(named)] if joined else pieces:
        for name, value in revert_weight_conversion(model, piece).items():
            yield name, value.contiguous()


def _of_dtype(section: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a configuration; `torch_dtype` is what older ones call the same."""
    return {**{k: v for k, v in section.items() if k != "torch_dtype"}, "dtype": name}


def _buffers(model: "PreTrainedModel") -> "Iterator[tuple[str, torch.Tensor]]":
    """What is stored and not trained, such as a router's correction bias, as it is."""
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in kept:
            yield _WRAPPER.sub("", name), buffer.detach().cpu()
