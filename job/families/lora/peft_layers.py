"""What PEFT's layers are asked before something else computes in their place."""

from typing import Any


def alone(layer: Any) -> str | None:
    """The one adapter that is active in a LoRA layer; None where PEFT's own way is to be taken.

    Another may join later, as the stored one does where it is proven, or be switched off.
    """
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    [name] = layer.active_adapters
    return name if name in layer.lora_A else None
