"""The merge: every tensor of the trained model as `base + scaling · B·A`, in fp32, cast once.

One tensor at a time, so that no second model is held beside the trained one. Values are looked at
where the model is, and digests are made in the background: a GPU's merge must not wait for a CPU.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from job.errors import ProofError
from job.families.weight_files import Weights, raw
from job.storage.background import BackgroundTasks

if TYPE_CHECKING:
    import torch

_WRAPPER = re.compile(r"\.base_layer")
_ADAPTER = re.compile(r"\.lora_")
DIGESTS_AT_ONCE = 2
"""Tensors that are held for their digest while the next one is merged."""


class Merge:
    """The merge of a PEFT model, or the cast of a fully trained one, and what it did."""

    def __init__(
        self, model: Any, *, dtype: "torch.dtype", keeps_fp32: Callable[[str], bool]
    ) -> None:
        peft = hasattr(model, "get_base_model")
        self._base = model.get_base_model() if peft else model
        self._deltas = lora_deltas(model) if peft else {}
        self._dtype, self._keeps_fp32 = dtype, keeps_fp32
        self._broken: list[str] = []
        self._broken_values = self._overflowed = 0
        self.digests: dict[str, str] = {}
        """SHA-256 of each tensor's bytes as it is to be written."""
        self.adapted = len(self._deltas)
        """Tensors that the adapter adapts."""
        self.changed = 0
        """Of those, the ones that differ from the base after the cast."""
        self.largest_change = 0.0

    def weights(self) -> Weights:
        """The merged model for a family to write."""
        return Weights(outlines=self._outlines(), tensors=self.tensors())

    def tensors(self) -> "Iterator[tuple[str, torch.Tensor]]":
        """Every merged tensor by its name in the model, on the CPU, made when it is asked for.

        Raises ProofError after the last where values are not finite, or do not fit into the dtype.
        """
        import torch

        with BackgroundTasks(
            "digest", threads=DIGESTS_AT_ONCE, max_pending=DIGESTS_AT_ONCE
        ) as digests:
            for name, parameter in self._parameters():
                with torch.no_grad():
                    merged = self._merged(name, parameter)
                self.digests[name] = ""  # in the order of the model, whichever is made first
                digests.submit(partial(self._note_digest, name, merged))
                yield name, merged
                del merged  # it may be large, and belongs to who asked for it
        assert not self._deltas, f"adapted but not in the model: {sorted(self._deltas)[:3]}"
        self._refuse_broken()

    def _outlines(self) -> "Iterator[tuple[str, torch.Tensor]]":
        import torch

        for name, parameter in self._parameters():
            yield name, torch.empty(parameter.shape, dtype=self._target(name), device="meta")

    def _parameters(self) -> "Iterator[tuple[str, torch.nn.Parameter]]":
        """The model's own, by their names without the adapter's wrappers."""
        for wrapped_name, parameter in self._base.named_parameters():
            if not _ADAPTER.search(wrapped_name):
                yield _WRAPPER.sub("", wrapped_name), parameter

    def _target(self, name: str) -> "torch.dtype":
        import torch

        return torch.float32 if self._keeps_fp32(name) else self._dtype

    def _merged(self, name: str, parameter: "torch.Tensor") -> "torch.Tensor":
        target = self._target(name)
        value = parameter.detach()
        if name in self._deltas:
            before = value.float()
            value = self._deltas.pop(name)(before)
            self._note_change(before, value, target)
            del before
        if not fits(value, target):
            self._note_broken(name, value, target)
        return value.to(target).cpu().contiguous()

    def _note_digest(self, name: str, merged: "torch.Tensor") -> None:
        self.digests[name] = digest(merged)

    def _note_broken(self, name: str, value: "torch.Tensor", target: "torch.dtype") -> None:
        finite = _finite(value)
        if finite < value.numel():
            self._broken.append(name)
            self._broken_values += value.numel() - finite
        self._overflowed += finite - _finite(value.to(target))

    def _note_change(
        self, before: "torch.Tensor", after: "torch.Tensor", target: "torch.dtype"
    ) -> None:
        import torch

        changed = False
        for old, new in zip(_pieces(before), _pieces(after), strict=True):
            changed = changed or not torch.equal(old.to(target), new.to(target))
            least, most = (new - old).aminmax()
            self.largest_change = max(self.largest_change, float(most), -float(least))
        self.changed += changed

    def _refuse_broken(self) -> None:
        if self._broken:
            raise ProofError(
                self._broken[0],
                f"the trained model holds {self._broken_values} values that are not finite, "
                f"in {len(self._broken)} tensors",
                fix="train again at a lower learning rate, or in bfloat16",
            )
        if self._overflowed:
            raise ProofError(
                "$.export.merged.dtype",
                f"{self._overflowed} values of the merged weights do not fit into the dtype",
                value=str(self._dtype).removeprefix("torch."),
                fix="--set export.merged.dtype=bfloat16",
            )


def digest(tensor: "torch.Tensor") -> str:
    """SHA-256 of the tensor's bytes."""
    return hashlib.sha256(raw(tensor)).hexdigest()


def fits(tensor: "torch.Tensor", target: "torch.dtype") -> bool:
    """Whether every value is finite, and stays so when it is cast.

    Rounding keeps the order of values, so the least and the largest tell of all between them, and
    both are NaN where one value is. Counting takes thirty times as long on a CPU.
    """
    import torch

    if not tensor.numel():
        return True
    extremes = [each for piece in _pieces(tensor) for each in piece.aminmax()]
    return bool(torch.isfinite(torch.stack(extremes).to(target)).all())


def _finite(tensor: "torch.Tensor") -> int:
    """How many values are finite."""
    import torch

    return sum(int(torch.isfinite(piece).sum()) for piece in _pieces(tensor))


def _pieces(tensor: "torch.Tensor") -> "Sequence[torch.Tensor]":
    """The tensor in pieces: what looks at every value holds copies of what it looks at."""
    return tensor.flatten().split(2**22)


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
        value = (b @ a).mul_(module.scaling[adapter]).add_(weight)
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
        return (b @ a).mul_(module.scaling[adapter]).add_(weight)

    return merged
