"""Routed experts in 4 bits of Transformers' own models: grouped products that keep them packed.

Transformers' `grouped_mm` transposes the experts first, which unpacks them, and autograd keeps what
it multiplies by: the experts of all layers, unpacked. This computes the same with
`frozen_grouped_mm`. ERNIE-4.5-VL has an implementation of its own, which uses that too.
"""

from typing import TYPE_CHECKING, Protocol

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from job.families.four_bit.tensor import FourBitTensor, frozen_grouped_mm
from job.families.grouped_products.choice import choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "packed_grouped_mm"


class _Experts(Protocol):
    """What `use_experts_implementation` of Transformers gives to a module of experts."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool

    def _apply_gate(self, rows: torch.Tensor) -> torch.Tensor: ...
    def act_fn(self, rows: torch.Tensor) -> torch.Tensor: ...


def use_packed_experts(model: "PreTrainedModel") -> None:
    """Selects this implementation for a model that computes its experts by `grouped_mm`, if any of
    them is packed."""
    packed = any(isinstance(p, FourBitTensor) and p.ndim == 3 for p in model.parameters())
    if not packed or getattr(model.config, "_experts_implementation", None) != "grouped_mm":
        return
    ALL_EXPERTS_FUNCTIONS.register(NAME, packed_experts)
    choose(model.device, model.dtype)  # before the first step: trying waits for the device
    model.set_experts_implementation(NAME)


def packed_experts(
    module: _Experts,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of each token's experts, (T, H) to (T, H), of indices and weights (T, k).

    Rows are sorted by expert; nothing waits for the device.
    """
    count, k = top_k_index.shape
    expert_of_row, order = top_k_index.flatten().sort(stable=True)  # (T·k,) each
    # histc, because bincount waits for the device; on a CPU it takes floats only.
    dtype = torch.float if hidden_states.device.type == "cpu" else torch.int
    rows_of_expert = torch.histc(  # (E,)
        expert_of_row.to(dtype), bins=module.num_experts, max=module.num_experts - 1
    )
    ends = rows_of_expert.cumsum(0, dtype=torch.int32)  # (E,)

    def project(name: str, rows: torch.Tensor) -> torch.Tensor:
        """(T·k, in) to (T·k, out), each row by its expert's matrix."""
        out = frozen_grouped_mm(
            rows, getattr(module, name), ends, is_transposed=module.is_transposed
        )
        return out + getattr(module, f"{name}_bias")[expert_of_row] if module.has_bias else out

    rows = hidden_states[order // k]
    if module.has_gate:
        inner = module._apply_gate(project("gate_up_proj", rows))
    else:
        inner = module.act_fn(project("up_proj", rows))
    out = project("down_proj", inner) * top_k_weights.flatten()[order, None]
    return out[order.argsort()].view(count, k, -1).sum(1).to(hidden_states.dtype)
