"""The merge: every tensor of the trained model as `base + scaling · B·A`, in fp32, cast once."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.errors import ProofError

if TYPE_CHECKING:
    import torch

_WRAPPER = re.compile(r"\.base_layer")
_ADAPTER = re.compile(r"\.lora_")


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The merged tensors on the CPU, and what the merge did to them."""

    state: "dict[str, torch.Tensor]"
    digests: dict[str, str]
    """SHA-256 of each tensor's bytes as it is to be written."""
    adapted: int
    """Tensors that the adapter adapts."""
    changed: int
    """Of those, the ones that differ from the base after the cast."""
    largest_change: float


def merge(model: Any, *, dtype: "torch.dtype", keeps_fp32: Callable[[str], bool]) -> Merged:
    """Merges a PEFT model, or casts a fully trained one, one tensor at a time.

    Raises ProofError where a merged value is not finite.
    """
    import torch

    deltas = lora_deltas(model) if hasattr(model, "get_base_model") else {}
    adapted = len(deltas)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    state: dict[str, torch.Tensor] = {}
    digests: dict[str, str] = {}
    changed, overflowed, largest = 0, 0, 0.0
    with torch.no_grad():
        for wrapped_name, parameter in base.named_parameters():
            if _ADAPTER.search(wrapped_name):
                continue
            name = _WRAPPER.sub("", wrapped_name)
            target = torch.float32 if keeps_fp32(name) else dtype
            value = parameter.detach().float()
            if not torch.isfinite(value).all():
                raise ProofError(name, "the trained model holds values that are not finite")
            if name in deltas:
                before = value.to(target)
                value = deltas.pop(name)(value)
                changed += not torch.equal(before, value.to(target))
                largest = max(largest, float((value - parameter.detach().float()).abs().max()))
            cast = value.to(target).cpu().contiguous()
            finite = torch.isfinite(cast)
            if not finite.all():
                overflowed += int((~finite).sum())
            state[name] = cast
            digests[name] = digest(cast)
    assert not deltas, f"adapted tensors were not found in the model: {sorted(deltas)[:3]}"
    if overflowed:
        raise ProofError(
            "$.export.merged.dtype",
            f"{overflowed} values of the merged weights do not fit into the dtype",
            value=str(dtype).removeprefix("torch."),
            fix="--set export.merged.dtype=bfloat16",
        )
    return Merged(
        state=state,
        digests=digests,
        adapted=adapted,
        changed=changed,
        largest_change=largest,
    )


def digest(tensor: "torch.Tensor") -> str:
    """SHA-256 of the tensor's bytes on the CPU."""
    import torch

    return hashlib.sha256(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


Delta = Callable[["torch.Tensor"], "torch.Tensor"]


def lora_deltas(model: Any) -> dict[str, Delta]:
    """For each adapted tensor's name, the function from its base value to its merged one, in fp32.

    Linear modules: W + scaling · B·A (LoRA, https://arxiv.org/abs/2106.09685; rsLoRA's scaling is
    PEFT's own), with DoRA scaled by magnitude over norm (https://arxiv.org/abs/2402.09353). Fused
    expert parameters (E, out, in): the same for each expert.
    """
    from peft.tuners.lora.layer import LoraLayer

    found: dict[str, Delta] = {}
    for wrapped_name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = _WRAPPER.sub("", wrapped_name)
        adapter = next(iter(module.lora_A), None)
        if adapter is None:
            continue
        parameter = getattr(module, "parameter_name", "weight")
        found[f"{name}.{parameter}"] = (
            _linear(module, adapter) if parameter == "weight" else _fused(module, adapter)
        )
    return found


def _linear(module: Any, adapter: str) -> Delta:
    def merged(weight: "torch.Tensor") -> "torch.Tensor":  # (out, in)
        a = module.lora_A[adapter].weight.float()  # (r, in)
        b = module.lora_B[adapter].weight.float()  # (out, r)
        value = weight + module.scaling[adapter] * (b @ a)
        if module.use_dora[adapter]:
            magnitude = module.lora_magnitude_vector[adapter].weight.float()  # (out,)
            value = value * (magnitude / value.norm(dim=1))[:, None]
        return value

    return merged


def _fused(module: Any, adapter: str) -> Delta:
    def merged(weight: "torch.Tensor") -> "torch.Tensor":  # (E, out, in)
        experts = module.num_experts
        a = module.lora_A[adapter].weight.float()  # (E·r, in)
        b = module.lora_B[adapter].weight.float()  # (out, r·E)
        a = a.reshape(experts, -1, a.shape[-1])  # (E, r, in)
        b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # (E, out, r)
        # bmm needs no copy of every expert's delta besides the result
        return weight + module.scaling[adapter] * (b @ a)

    return merged
