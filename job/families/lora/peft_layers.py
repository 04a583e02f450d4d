"""When something else may compute one of PEFT's layers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def sole_active_adapter(layer: "LoraLayer") -> str | None:
    """The one active adapter of a LoRA layer; None if PEFT itself has to compute the layer.

    PEFT has to if adapters are disabled or merged, or if several are active, as when an export
    proves the stored adapter beside the trained one.
    """
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    [name] = layer.active_adapters
    return name if name in layer.lora_A else None
