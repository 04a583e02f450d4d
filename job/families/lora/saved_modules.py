"""Modules that are trained in full beside an adapter (`lora.modules_to_save`).

PEFT copies such a module in the dtype of the model. Here the copy is in fp32, because updates are
often too small for bf16, and computes in the original's dtype: its weights are cast on each call,
like the matrices of `linear.LoraLinear`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.func import functional_call

from job.families.class_swap import swap_class

if TYPE_CHECKING:
    from peft import PeftModel


class SavedModule(ModulesToSaveWrapper):
    """PEFT's wrapper with another forward pass; names and files are unchanged."""

    def _forward_wrapped(self, *args: object, **kwargs: object) -> object:
        if not self.active_adapters:
            return self._forward_wrapped_passthrough(*args, **kwargs)
        trained = self.modules_to_save[self.active_adapters[0]]
        originals = dict(self.original_module.named_parameters())
        cast = {
            name: parameter.to(originals[name].dtype)
            for name, parameter in trained.named_parameters()
            if name in originals and parameter.dtype != originals[name].dtype
        }
        return functional_call(trained, cast, args, kwargs) if cast else trained(*args, **kwargs)


def use_saved_modules(model: nn.Module) -> int:
    """Trains the copies of saved modules in fp32; returns the number of modules.

    Tied copies stay tied: their parameters are changed in place.
    """
    wrappers = list(saved_modules(model).values())
    for wrapper in wrappers:
        if type(wrapper) is ModulesToSaveWrapper:
            swap_class(wrapper, SavedModule)
        for parameter in wrapper.modules_to_save.parameters():
            parameter.data = parameter.data.float()
    return len(wrappers)


def saved_modules(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """The wrappers of a PEFT model's saved modules, by their name in it."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def tie_copies(model: "PeftModel", adapter: str) -> None:
    """Ties the output layer's copy to the embeddings', for an adapter loaded beside another.

    PEFT ties only those of a model's first adapter.
    """
    embeddings = model.get_input_embeddings()
    for wrapper in saved_modules(model).values():
        if adapter not in wrapper.modules_to_save:
            assert isinstance(embeddings, ModulesToSaveWrapper)
            wrapper.update(adapter, tied_module=embeddings.modules_to_save[adapter])


def restore(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies the saved modules' stored tensors, by name in the adapter's file, into their copies.

    PEFT has rounded them to the model's dtype.
    """
    for name, wrapper in saved_modules(model).items():
        [copy] = wrapper.modules_to_save.values()
        for inner, parameter in copy.named_parameters():
            with torch.no_grad():
                parameter.copy_(tensors[f"{name}.{inner}"])
