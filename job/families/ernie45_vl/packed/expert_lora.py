"""LoRA on routed experts, computed separately from their frozen weights.

PEFT would add the product of each pair of matrices to a copy of all experts' weights, and save that
copy for the backward pass: two GiB per layer at full size.
"""

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from peft.tuners.lora import ParamWrapper
from torch.nn.functional import pad

from job.families.autograd import Context
from job.families.base import SORTED_EXPERTS
from job.families.lora.gate_up import GateUpWrapper, zero_outside_blocks
from job.families.lora.peft_layers import sole_active_adapter

if TYPE_CHECKING:
    from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as native

RANK_MULTIPLE = 8
"""Grouped products need rows that are multiples of 16 bytes: eight elements in bf16."""


class ExpertLora(NamedTuple):
    """LoRA on one weight (out, in) of each of E experts, as PEFT stores it."""

    down: torch.Tensor
    """(E·r, in): expert by expert."""
    up: torch.Tensor
    """(out, r·E): the experts' columns interleaved."""
    scaling: float
    experts: int
    gate_up: bool
    """Whether gate and up have an adapter each: `up` trains only its blocks."""

    def in_dtype(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`down` (E, in, r) and `up` (E, r, out), r padded with zeros to `RANK_MULTIPLE`."""
        down = self.down.to(dtype).unflatten(0, (self.experts, -1))  # (E, r, in)
        up = expert_major(self.up.to(dtype), self.experts, self.gate_up)  # (E, r, out)
        missing = -down.shape[1] % RANK_MULTIPLE
        if missing:
            down, up = pad(down, (0, 0, 0, missing)), pad(up, (0, 0, 0, missing))
        return down.transpose(1, 2), up


ExpertLoras = dict[str, ExpertLora]
"""By the name of the adapted parameter."""


class CastLora(NamedTuple):
    """An `ExpertLora` whose matrices are cast once, for many steps without training."""

    matrices: tuple[torch.Tensor, torch.Tensor]
    scaling: float

    @classmethod
    def of(cls, lora: ExpertLora, dtype: torch.dtype) -> "CastLora":
        down, up = lora.in_dtype(dtype)
        return cls((down.detach(), up.detach()), lora.scaling)

    def in_dtype(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return self.matrices


def expert_loras(
    experts: "native.Ernie4_5_VLMoeMoeExperts | ParamWrapper",
) -> ExpertLoras:
    """The adapters of routed experts; empty if PEFT's or the experts' own forward has to run."""
    loras = adapters_of(experts)
    if not loras:
        return {}
    implementation = experts.get_base_layer().config._experts_implementation
    return loras if implementation == SORTED_EXPERTS else {}


def adapters_of(
    experts: "native.Ernie4_5_VLMoeMoeExperts | ParamWrapper",
) -> ExpertLoras:
    """The adapters of routed experts; empty without any, or if PEFT has to compute them."""
    loras: ExpertLoras = {}
    layer = experts
    while isinstance(layer, ParamWrapper):
        name = sole_active_adapter(layer)
        if name is None:
            return {}
        loras[layer.parameter_name] = ExpertLora(
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
            layer.num_experts,
            isinstance(layer, GateUpWrapper),
        )
        layer = layer.base_layer
    return loras


@torch.library.custom_op("finetune_job::expert_major", mutates_args=())
def expert_major(up: torch.Tensor, experts: int, gate_up: bool) -> torch.Tensor:
    """(out, r·E), experts interleaved, to (E, r, out), contiguous.

    With `gate_up`, the gradient is zero outside the blocks of `up`. A custom operator: the compiler
    would replace the copy by a view, which grouped products reject.
    """
    return (
        up.unflatten(1, (-1, experts)).permute(2, 1, 0).clone(memory_format=torch.contiguous_format)
    )


@expert_major.register_fake
def _(up: torch.Tensor, experts: int, gate_up: bool) -> torch.Tensor:
    return up.new_empty(experts, up.shape[1] // experts, up.shape[0])


class _ExpertMajorContext(Context, Protocol):
    gate_up: bool


def _save_kind(
    ctx: _ExpertMajorContext, inputs: tuple[torch.Tensor, int, bool], output: torch.Tensor
) -> None:
    ctx.gate_up = inputs[2]


def _expert_major_backward(
    ctx: _ExpertMajorContext, grad: torch.Tensor
) -> tuple[torch.Tensor, None, None]:
    # (out, r·E), always a copy
    grad = grad.permute(2, 1, 0).clone(memory_format=torch.contiguous_format).flatten(1)
    if ctx.gate_up:
        zero_outside_blocks(grad)
    return grad, None, None


expert_major.register_autograd(_expert_major_backward, setup_context=_save_kind)
