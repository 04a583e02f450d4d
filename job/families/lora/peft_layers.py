"""Whether this project may compute a PEFT layer itself, instead of calling it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def sole_active_adapter(layer: "LoraLayer") -> str | None:
    """The one active adapter of a LoRA layer; None if PEFT itself has to compute the layer.

    PEFT has to if adapters are disabled or merged, or if not exactly one is active.
    """
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    [name] = layer.active_adapters
    return name if name in layer.lora_A else None
