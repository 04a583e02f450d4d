"""Writes what training produces: the adapter, for PEFT and for vLLM, or the weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from job.families.base import Family
from job.families.weight_files import Weights
from job.redaction import redact, redacted
from job.spec.output_folders import ADAPTER, SERVED_ADAPTER, WEIGHTS
from job.spec.types import JobSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer

_FORWARDS: tuple[str, ...] = ("forward", "_original_forward")
"""Attributes that Accelerate sets on an instance."""

Model = TypeVar("Model", bound="torch.nn.Module")


def store_trained(
    spec: JobSpec, family: Family, trainer: "Trainer", directory: Path | None
) -> "PreTrainedModel | PeftModel | None":
    """Stores the trained weights in `directory`; returns the model in evaluation mode.

    Only the process with a `directory` writes, but all have to call it if the model is sharded;
    then it returns None.
    """
    from job.engines import sharding

    model = trainer.model
    if spec.shards_trained_weights:
        if directory is None:
            sharding.help_to_gather(model)
        else:
            _save_weights(spec, family, model, sharding.gathered_weights(model), directory)
        return None
    if sharding.is_sharded(model):
        state = sharding.trained_state(model)
        if directory is not None:
            store_weights(spec, family, model, state, directory)
        return None
    model = without_autocast(trainer.accelerator.unwrap_model(model))
    if directory is not None:
        store_weights(spec, family, model, None, directory)
    return model.eval()


def without_autocast(model: Model) -> Model:
    """Removes the `forward` that Accelerate has set on the instance, which autocasts.

    After training the model has to compute in the dtype of the stored weights. Accelerate's own
    `unwrap_model` would also strip the decorators of Transformers' `forward`, and break generation.
    """
    for name in _FORWARDS:
        vars(model).pop(name, None)
    return model


@contextmanager
def autocast_removed(model: "torch.nn.Module") -> Iterator[None]:
    """A context without what `without_autocast` removes."""
    own = {name: vars(model).pop(name) for name in _FORWARDS if name in vars(model)}
    try:
        yield
    finally:
        vars(model).update(own)


def store_weights(
    spec: JobSpec,
    family: Family,
    model: "PreTrainedModel | PeftModel",
    state: "dict[str, torch.Tensor] | None",
    directory: Path,
) -> None:
    """Stores the trained weights; `state` is the gathered adapter of a sharded model."""
    if spec.lora.method == "lora":
        store_adapter(spec, family, model, state, directory)
        return
    _save_weights(spec, family, model, Weights.of(model.named_parameters()), directory)


def _save_weights(
    spec: JobSpec, family: Family, model: "PreTrainedModel", weights: Weights, directory: Path
) -> None:
    family.save(
        model,
        weights,
        directory / WEIGHTS,
        dtype=next(model.parameters()).dtype,
        max_shard_size=spec.export.merged.max_shard_size,
        layout="transformers",
    )


def store_adapter(
    spec: JobSpec,
    family: Family,
    model: "PeftModel",
    state: "dict[str, torch.Tensor] | None",
    directory: Path,
) -> None:
    """Stores the adapter with its tokenizer and processor, and once more for vLLM if that can serve
    it: the folders `ADAPTER` and `SERVED_ADAPTER`.

    `state` is the gathered adapter of a sharded model.
    """
    _save_adapter(spec, model, state, directory / ADAPTER)
    if not family.adapter_serving(spec.lora).merged_only:
        served = directory / SERVED_ADAPTER
        family.write_served_adapter(directory / ADAPTER, served)
        if spec.model.chat_template is not None:  # the base that it is served with has another
            family.write_chat_template(served, layout="vllm")
    # Not in the served one: servers use the tokenizer of the base.
    family.save_processor(directory / ADAPTER)


def _save_adapter(
    spec: JobSpec, model: "PeftModel", state: "dict[str, torch.Tensor] | None", directory: Path
) -> None:
    model.save_pretrained(directory, safe_serialization=True, state_dict=state)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty template
    path = directory / "adapter_config.json"
    # Libraries that patch PEFT add keys that PEFT warns about when it loads the adapter.
    known = {field.name for field in fields(model.peft_config[model.active_adapter])}
    config = {key: v for key, v in json.loads(path.read_text()).items() if key in known}
    # Set only now: with a name, `save_pretrained` looks the model up on the hub.
    config["base_model_name_or_path"] = redact(spec.model.model_name_or_path).removeprefix("hf://")
    config = redacted(with_sorted_lists(config))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def with_sorted_lists(config: dict[str, Any]) -> dict[str, Any]:
    """Sorts lists, because PEFT writes sets in hash order: equal adapters must be equal files."""
    return {key: sorted(v) if isinstance(v, list) else v for key, v in config.items()}
