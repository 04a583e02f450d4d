"""The one way in which this project changes how a model's existing modules compute.

A module of Transformers or PEFT becomes an instance of a subclass that adds methods, no state.
Parameters, buffers, their names, hooks and wrappers around the module stay what they are, which a
module in its place could not guarantee. Used by `lora.linear` (PEFT's linear layers) and by
`ernie45_vl.packed` (the model, its decoder layers and vision blocks).
"""

from torch import nn


def swap_class(module: nn.Module, subclass: type[nn.Module]) -> None:
    """Makes the module an instance of a subclass of its class."""
    assert issubclass(subclass, type(module)), f"{subclass} is no subclass of {type(module)}"
    module.__class__ = subclass
