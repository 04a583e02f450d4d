"""What training leaves: the adapter, for PEFT and for vLLM, or the weights."""

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.families.base import Family
from job.families.weight_files import Weights
from job.redaction import redact, redacted
from job.spec.types import JobSpec

if TYPE_CHECKING:
    from transformers import Trainer

ADAPTER, SERVED_ADAPTER, WEIGHTS = "adapter", "adapter-vllm", "weights"


def finish(spec: JobSpec, family: Family, trainer: "Trainer", directory: Path | None) -> Any:
    """The trained model, stored in `directory` by who has one; None where it is in shares."""
    from job.engines import sharding

    model = trainer.model
    if sharding.is_sharded(model):
        state = sharding.trained_state(model)
        if directory is not None:
            _store_weights(spec, family, model, state, directory)
        return None
    model = without_autocast(trainer.accelerator.unwrap_model(model))
    if directory is not None:
        _store_weights(spec, family, model, None, directory)
    return model.eval()


def without_autocast(model: Any) -> Any:
    """The model with its class's own `forward` again, in place of accelerate's around it.

    Autocast ends with training: what is compared with the stored weights computes as they do.
    Accelerate's own way back goes too far where `forward` is decorated, as those of Transformers
    are: it takes their decorators off too, and the model no longer generates.
    """
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)
    return model


def _store_weights(
    spec: JobSpec, family: Family, model: Any, state: dict[str, Any] | None, directory: Path
) -> None:
    """Stores what was trained; where the model is in shares `state` is the adapter, whole."""
    if spec.lora.method == "lora":
        _store_adapter(spec, model, state, directory / ADAPTER)
        if not family.adapter_serving(spec.lora).merged_only:
            family.write_served_adapter(directory / ADAPTER, directory / SERVED_ADAPTER)
        return
    family.save(
        model,
        Weights.of(model.named_parameters()),
        directory / WEIGHTS,
        dtype=next(model.parameters()).dtype,
        max_shard_size=spec.export.merged.max_shard_size,
        layout="transformers",
    )


def _store_adapter(
    spec: JobSpec, model: Any, state: dict[str, Any] | None, directory: Path
) -> None:
    model.save_pretrained(directory, safe_serialization=True, state_dict=state)
    (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty form
    # PEFT writes sets in the order of the day; equal adapters shall be equal files.
    path = directory / "adapter_config.json"
    # Libraries that patch PEFT add keys, of which it warns whoever reads them.
    known = {field.name for field in fields(model.peft_config[model.active_adapter])}
    config = {key: v for key, v in json.loads(path.read_text()).items() if key in known}
    # Named only now: PEFT would go and look the name up at the hub.
    config["base_model_name_or_path"] = redact(spec.model.model_name_or_path).removeprefix("hf://")
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value)
    path.write_text(json.dumps(redacted(config), indent=2, sort_keys=True) + "\n")
