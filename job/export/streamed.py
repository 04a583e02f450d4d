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
    wanted: dict[int, list[tuple[nn.Module, str, str]]] = {id(block): [] for block in blocks}
    others: list[tuple[nn.Module, str, str]] = []
    owner = {id(p): (m, n) for m in base.modules() for n, p in m._parameters.items()}
    for name, parameter in parameters_of(base):
        if every or is_unloaded(parameter):
            module, own = owner[id(parameter)]
            block = place.get(id(module))
            (others if block is None else wanted[id(block)]).append((module, own, name))
    before: dict[int, list[torch.nn.Parameter | None]] = {}

    def give(weights: "list[tuple[nn.Module, str, str]]", key: int) -> None:
        before[key] = [module._parameters[own] for module, own, _ in weights]
        for module, own, name in weights:
            module._parameters[own] = torch.nn.Parameter(read(name), requires_grad=False)

    def take(weights: "list[tuple[nn.Module, str, str]]", key: int) -> None:
        for (module, own, _), parameter in zip(weights, before.pop(key, ()), strict=False):
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
