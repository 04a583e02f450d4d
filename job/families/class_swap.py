"""Changes how an existing module computes, by swapping its class.

A module of Transformers or PEFT becomes an instance of a subclass that adds methods, but no state.
Its parameters, buffers, names, hooks and wrappers stay, which replacing the module could not
guarantee. Used by `lora.linear` (PEFT's linear layers) and by
`ernie45_vl.packed` (the model, its decoder layers and vision blocks).
"""

from torch import nn


def swap_class(module: nn.Module, subclass: type[nn.Module]) -> None:
    """Makes the module an instance of `subclass`, in place."""
    assert issubclass(subclass, type(module)), f"{subclass} is no subclass of {type(module)}"
    module.__class__ = subclass
