"""Runs a model with weights that are read from a checkpoint block by block.

For a base in 4 bits, whose device may have no room for the weights that the export consists of:
each decoder layer and vision block gets its weights right before it runs, and loses them after.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from job.export.merge import is_unloaded, parameters_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn

Read = Callable[[str], "torch.Tensor"]
"""A weight by its name in the model, on the model's device."""
_Owner = tuple["nn.Module", str]
"""A module that has the weight, and the weight's name in it."""
_Weight = tuple[str, list[_Owner]]
"""A weight's name in the model, and its owners."""


def unload_packed(model: "PeftModel") -> int:
    """Frees the weights in 4 bits, which leave their shapes on the meta device; returns their
    number."""
    import torch

    from job.families.four_bit.tensor import FourBitTensor

    count = 0
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, FourBitTensor):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
                count += 1
    return count


@contextmanager
def streamed_weights(model: "PeftModel", read: Read, *, every: bool) -> Iterator[None]:
    """A context in which the base inside the adapter has the weights of `read`.

    All of them with `every`, else those that `unload_packed` freed. Blocks have theirs only while
    they run; all other modules until the end.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = model.get_base_model()
    blocks = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    place = {id(inner): block for block in blocks for inner in block.modules()}
    wanted: dict[int, list[_Weight]] = {id(block): [] for block in blocks}
    others: list[_Weight] = []
    owners: dict[int, list[_Owner]] = {}
    for module in base.modules():
        for own, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append((module, own))
    for name, parameter in parameters_of(base):
        if every or is_unloaded(parameter):
            _add(wanted, others, place, name, owners[id(parameter)])
    before: dict[int, list[torch.nn.Parameter | None]] = {}

    def give(weights: list[_Weight], key: int) -> None:
        before[key] = [module._parameters[own] for _, owned in weights for module, own in owned]
        for name, owned in weights:
            weight = torch.nn.Parameter(read(name), requires_grad=False)
            for module, own in owned:
                module._parameters[own] = weight

    def take(weights: list[_Weight], key: int) -> None:
        slots = [slot for _, owned in weights for slot in owned]
        for (module, own), parameter in zip(slots, before.pop(key, ()), strict=False):
            module._parameters[own] = parameter

    with ExitStack() as stack:
        give(others, 0)
        stack.callback(take, others, 0)
        for block in blocks:
            weights, key = wanted[id(block)], id(block)
            hooks = (
                block.register_forward_pre_hook(lambda *_, w=weights, k=key: give(w, k)),
                block.register_forward_hook(
                    lambda *_, w=weights, k=key: take(w, k), always_call=True
                ),
            )
            for hook in hooks:
                stack.callback(hook.remove)
        yield


def _add(
    wanted: dict[int, list[_Weight]],
    others: list[_Weight],
    place: "dict[int, nn.Module]",
    name: str,
    owners: list[_Owner],
) -> None:
    """Adds a weight to each block that has it, once, and to what is outside of the blocks.

    Tied weights have several owners: an embedding and the output layer.
    """
    by_place: dict[int | None, list[_Owner]] = {}
    for module, own in owners:
        block = place.get(id(module))
        by_place.setdefault(None if block is None else id(block), []).append((module, own))
    for key, owned in by_place.items():
        (others if key is None else wanted[key]).append((name, owned))
