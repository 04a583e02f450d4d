"""LoRA on routed experts, beside their frozen weights.

PEFT would add the product of each pair of matrices to a copy of all experts' weights, and keep that
copy for the backward pass: at full size two GiB a layer.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import ParamWrapper
from torch.nn.functional import pad

from job.families.base import SORTED_EXPERTS
from job.families.lora.peft_layers import alone

RANKS = 8
"""A grouped product takes rows of whole 16 bytes: eight numbers in bf16."""


class Adapter(NamedTuple):
    """LoRA on one matrix of each of E experts, as PEFT keeps it: two matrices for all of them."""

    down: torch.Tensor
    """(E·r, in): one expert after another."""
    up: torch.Tensor
    """(out, r·E): the experts' columns take turns."""
    scaling: float
    experts: int

    def in_dtype(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(E, in, r) and (E, r, out), where r is filled up with zeros to what kernels take."""
        down = self.down.to(dtype).unflatten(0, (self.experts, -1))  # (E, r, in)
        up = by_expert(self.up.to(dtype), self.experts)
        missing = -down.shape[1] % RANKS
        if missing:
            down, up = pad(down, (0, 0, 0, missing)), pad(up, (0, 0, 0, missing))
        return down.transpose(1, 2), up


@torch.library.custom_op("finetune_job::by_expert", mutates_args=())
def by_expert(up: torch.Tensor, experts: int) -> torch.Tensor:
    """(out, r·E), the experts' columns in turns, to (E, r, out) as it lies in memory.

    An operation of its own, as the compiler would leave the matrix as it is and only look at it in
    another way, which the grouped product refuses.
    """
    return (
        up.unflatten(1, (-1, experts)).permute(2, 1, 0).clone(memory_format=torch.contiguous_format)
    )


@by_expert.register_fake
def _(up: torch.Tensor, experts: int) -> torch.Tensor:
    return up.new_empty(experts, up.shape[1] // experts, up.shape[0])


def _gradient_by_expert(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return grad.permute(2, 1, 0).flatten(1), None


by_expert.register_autograd(_gradient_by_expert)


Adapters = dict[str, Adapter]
"""By the name of the parameter that is adapted."""


def adapters_of(experts: Any) -> Adapters:
    """What a job's adapter adds to routed experts; nothing where their own way is to be taken."""
    found: Adapters = {}
    layer = experts
    while isinstance(layer, ParamWrapper):
        name = alone(layer)
        if name is None:
            return {}
        found[layer.parameter_name] = Adapter(
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
            layer.num_experts,
        )
        layer = layer.base_layer
    return found if layer.config._experts_implementation == SORTED_EXPERTS else {}
