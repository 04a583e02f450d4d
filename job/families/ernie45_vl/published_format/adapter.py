"""Renames an adapter's tensors for vLLM, which expects the published names.

An adapter with the names of Transformers' classes loads without an error, but has no effect.
"""

import json
from pathlib import Path

from job.families.ernie45_vl.published_format.weights import rename

_PREFIX = "base_model.model."


def write(adapter: Path, directory: Path) -> None:
    """Copies a stored PEFT adapter of language attention, renaming its tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {
        _PREFIX + rename(name.removeprefix(_PREFIX)): tensor for name, tensor in tensors.items()
    }
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["target_modules"] = sorted(
        {name.partition(".lora_")[0].rpartition(".")[2] for name in renamed}
    )
    directory.mkdir(parents=True, exist_ok=True)
    save_file(renamed, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (directory / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
