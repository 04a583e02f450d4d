"""Two adapters in one fused parameter: gate and up, each with an A and a B of its own.

Transformers fuses the gate and up projections of routed experts into one parameter (E, 2·I, in).
Checkpoints publish them as modules, whose adapters share nothing. In PEFT's format, which knows one
adapter per parameter, the two are one of rank 2·r, with twice the alpha:

    A = [A_gate; A_up]  (2·r, in)        B = [[B_gate, 0], [0, B_up]]  (2·I, 2·r)

PEFT itself converts the adapters of other models' single experts like this, and loads such an
adapter as any other. The zeros are stored with B and stay zero: their gradient is set to zero, and
an optimizer moves no weight that is zero and has had no gradient.
"""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import ParamWrapper
from torch import nn

from job.families.autograd import Context
from job.families.class_swap import swap_class
from job.families.lora.adapter_names import BASE_LAYER

if TYPE_CHECKING:
    from peft import PeftModel


class GateUpWrapper(ParamWrapper):
    """PEFT's wrapper of a parameter, which trains only the blocks of B; see the module."""

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Matrices (E, 2·I, 2·r) and (E, 2·r, in), and the factor of their product."""
        up = train_blocks(self.lora_B[adapter_name].weight)  # (2·I, 2·r·E)
        up = up.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1)
        down = self.lora_A[adapter_name].weight.unflatten(0, (self.num_experts, -1))
        dtype = self.get_param().dtype
        return up.to(dtype), down.to(dtype), self.scaling[adapter_name]


# PEFT recognizes its wrapper by this name, and would wrap the parameter of a second adapter anew.
GateUpWrapper.__name__ = ParamWrapper.__name__


def use_gate_up(model: nn.Module, names: Collection[str]) -> None:
    """Makes the adapters of these parameters, by full name, train only their blocks."""
    found = {name for name, wrapper in wrapped_parameters(model) if name in names}
    assert found == {*names}, "PEFT wraps other parameters"
    for name, wrapper in wrapped_parameters(model):
        if name in names:
            swap_class(wrapper, GateUpWrapper)


def wrapped_parameters(model: "PeftModel") -> Iterator[tuple[str, ParamWrapper]]:
    """The wrapper of each adapted parameter, with the parameter's full name."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ParamWrapper):
            yield f"{name.replace(BASE_LAYER, '')}.{module.parameter_name}", module


def untrained_zeros(model: nn.Module) -> int:
    """How many elements of the model's adapters are zeros outside the blocks."""
    wrappers = (module for module in model.modules() if isinstance(module, GateUpWrapper))
    return sum(b.weight.numel() // 2 for wrapper in wrappers for b in wrapper.lora_B.values())


def zero_outside_blocks(b: torch.Tensor) -> None:
    """Sets B (2·I, 2·r·E), or its gradient, to zero outside the blocks, in place."""
    for part in _outside_blocks(b):
        part.zero_()


def has_blocks(b: torch.Tensor) -> bool:
    """Whether B (2·I, R·E) is zero outside the blocks of two adapters of one rank."""
    return b.shape[0] % 2 == b.shape[1] % 2 == 0 and not any(
        bool(part.any()) for part in _outside_blocks(b)
    )


def _outside_blocks(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the two zero matrices. Columns are ordered by rank, then by expert."""
    rows, columns = b.shape[0] // 2, b.shape[1] // 2
    return b[:rows, columns:], b[rows:, :columns]


def train_blocks(b: torch.Tensor) -> torch.Tensor:
    """B (2·I, 2·r·E) as it is; its gradient is zero outside the blocks."""
    return _TrainBlocks.apply(b)


class _TrainBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, b: torch.Tensor) -> torch.Tensor:
        return b.view_as(b)

    @staticmethod
    def backward(ctx: Context, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        zero_outside_blocks(grad)
        return grad
