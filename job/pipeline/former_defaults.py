"""What keys that are left unset count as in fingerprints: the default that was replaced.

So results and checkpoints from before a default changed stay valid where it selects the same.
"""

from dataclasses import asdict, replace
from typing import Any

from job.families.base import Family
from job.spec.types import LoraSpec

AUTO_COUNTS_AS = {"gradient_checkpointing": True, "torch_compile": False}
"""The default that `auto` replaced."""


def lora_settings(lora: LoraSpec, family: type[Family]) -> dict[str, Any]:
    """The section, with unset attention as `true` if that selects the same modules in the family;
    an unset value stays None if it does not."""
    settings = asdict(lora)
    if lora.finetune_attention_modules is None:
        former = replace(lora, finetune_attention_modules=True)
        if family.adapter_serving(former) == family.adapter_serving(lora):
            settings["finetune_attention_modules"] = True
    return settings
