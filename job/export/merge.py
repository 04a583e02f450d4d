"""Merges an adapter into its base: `base + scaling · B·A` for every tensor, in fp32, cast once.

Tensors are merged one at a time, to avoid a second model in memory. All of it happens on the
model's device, checks and digests too, so that a GPU does not wait for the CPU.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from job.errors import ProofError
from job.export.tensor_digests import TensorDigests
from job.families.weight_files import Weights

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper
    from transformers import PreTrainedModel

_WRAPPER = re.compile(r"\.(base_layer|original_module)(?=\.|$)")
_ADAPTER = re.compile(r"\.(lora_|modules_to_save\.)")
CHUNK = {"cpu": 2**22}
"""Elements for which temporary copies are made at a time: they fit into a CPU's caches."""
CHUNK_ON_GPU = 2**26


class Merge:
    """The merge of a PEFT model, or the cast of a fully fine-tuned one, with its statistics."""

    def __init__(
        self,
        model: "PeftModel | PreTrainedModel",
        *,
        dtype: "torch.dtype",
        keeps_fp32: Callable[[str], bool],
        read: "Callable[[str], torch.Tensor] | None" = None,
    ) -> None:
        """`read` reads the weights of the base that are not in memory, by name."""
        peft = hasattr(model, "get_base_model")
        self._base = model.get_base_model() if peft else model
        self._merges = lora_merges(model) if peft else {}
        self._dtype, self._keeps_fp32, self._read = dtype, keeps_fp32, read
        self._non_finite: list[str] = []
        self._non_finite_values = self._overflowed = 0
        self.digests: dict[str, str] = {}
        """The digest of each merged tensor, by name, in the model's order."""
        self.adapted = len(self._merges)
        """Number of adapted tensors."""
        self.changed = 0
        """Number of adapted tensors that differ from the base after the cast."""
        self.largest_change = 0.0

    def weights(self) -> Weights:
        """The merged weights, for `Family.save`."""
        return Weights(meta_tensors=dict(self._meta_tensors()), tensors=self.tensors)

    def tensors(self, names: Iterable[str] | None = None) -> "Iterator[tuple[str, torch.Tensor]]":
        """Yields the named tensors in that order, or all, merged and on the model's device.

        All have to be named, once each. Raises ProofError after the last one if values are not
        finite, or overflow the dtype.
        """
        import torch

        parameters = dict(parameters_of(self._base))
        with TensorDigests() as digests:
            for name in parameters if names is None else names:
                with torch.no_grad():
                    merged = self._merged(name, parameters[name])
                digests.add(name, merged, merged.dtype)
                yield name, merged
                del merged  # it may be large; the caller has it now
            found = digests.finish()
        assert not self._merges, f"adapted but not in the model: {sorted(self._merges)[:3]}"
        self.digests = {name: found[name] for name in parameters}
        self._require_finite()

    def _meta_tensors(self) -> "Iterator[tuple[str, torch.Tensor]]":
        import torch

        for name, parameter in parameters_of(self._base):
            yield name, torch.empty(parameter.shape, dtype=self._target(name), device="meta")

    def _target(self, name: str) -> "torch.dtype":
        import torch

        return torch.float32 if self._keeps_fp32(name) else self._dtype

    def _merged(self, name: str, parameter: "torch.Tensor") -> "torch.Tensor":
        target = self._target(name)
        value = parameter.detach()
        if is_unloaded(parameter):
            assert self._read is not None, f"not in memory: {name}"
            value = self._read(name)
        if name in self._merges:
            before = value.float()
            value = self._merges.pop(name)(before)
            self._record_change(before, value, target)
            del before
        if not fits(value, target):
            self._record_non_finite(name, value, target)
        return value.to(target).contiguous()

    def _record_non_finite(self, name: str, value: "torch.Tensor", target: "torch.dtype") -> None:
        finite = _count_finite(value)
        if finite < value.numel():
            self._non_finite.append(name)
            self._non_finite_values += value.numel() - finite
        self._overflowed += finite - _count_finite(value.to(target))

    def _record_change(
        self, before: "torch.Tensor", after: "torch.Tensor", target: "torch.dtype"
    ) -> None:
        import torch

        changed, extremes = False, list[torch.Tensor]()
        for old, new in zip(_chunks(before), _chunks(after), strict=True):
            changed = changed or not torch.equal(old.to(target), new.to(target))
            extremes += (new - old).aminmax()
        largest = torch.stack(extremes).abs().max()
        self.largest_change = max(self.largest_change, float(largest))
        self.changed += changed

    def _require_finite(self) -> None:
        if self._non_finite:
            raise ProofError(
                self._non_finite[0],
                f"the trained model contains {self._non_finite_values} values that are not finite, "
                f"in {len(self._non_finite)} tensors",
                fix="train again at a lower learning rate, or in bfloat16",
            )
        if self._overflowed:
            raise ProofError(
                "$.export.merged.dtype",
                f"{self._overflowed} values of the merged weights overflow the dtype",
                value=str(self._dtype).removeprefix("torch."),
                fix="--set export.merged.dtype=bfloat16",
            )


def parameters_of(base: "PreTrainedModel") -> "Iterator[tuple[str, torch.nn.Parameter]]":
    """The base model's parameters, by their names without the adapter's wrappers."""
    for wrapped_name, parameter in base.named_parameters():
        if not _ADAPTER.search(wrapped_name):
            yield _WRAPPER.sub("", wrapped_name), parameter


def is_unloaded(parameter: "torch.Tensor") -> bool:
    """Whether only the parameter's shape is left: it was in 4 bits; see `job.export.streamed`."""
    return parameter.is_meta


def fits(tensor: "torch.Tensor", target: "torch.dtype") -> bool:
    """Whether every value is finite, before and after the cast.

    Checks only the minimum and maximum: casts are monotonic, and a NaN makes both NaN. Counting
    finite values would take thirty times as long on a CPU.
    """
    import torch

    if not tensor.numel():
        return True
    extremes = [each for chunk in _chunks(tensor) for each in chunk.aminmax()]
    return bool(torch.isfinite(torch.stack(extremes).to(target)).all())


def _count_finite(tensor: "torch.Tensor") -> int:
    import torch

    return sum(int(torch.isfinite(chunk).sum()) for chunk in _chunks(tensor))


def _chunks(tensor: "torch.Tensor") -> "Sequence[torch.Tensor]":
    """The tensor in chunks, which bounds the size of temporary copies."""
    return tensor.flatten().split(CHUNK.get(tensor.device.type, CHUNK_ON_GPU))


MergeFunction = Callable[["torch.Tensor"], "torch.Tensor"]


def lora_merges(model: "PeftModel") -> dict[str, MergeFunction]:
    """For each adapted tensor, by name, the function from its base to its merged value, in fp32.

    Linear modules: W + scaling · B·A (LoRA, https://arxiv.org/abs/2106.09685; PEFT applies rsLoRA's
    scaling), times magnitude over norm for DoRA (https://arxiv.org/abs/2402.09353). Fused expert
    parameters (E, out, in): the same for each expert. Modules trained in full: their trained copy.
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    merges: dict[str, MergeFunction] = {}
    originals = set[int]()
    for wrapped_name, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            merges |= _saved(wrapped_name, module, originals)
        if not isinstance(module, LoraLayer):
            continue
        name = _WRAPPER.sub("", wrapped_name)
        adapter = next(iter(module.lora_A), None)
        if adapter is None:
            continue
        parameter = getattr(module, "parameter_name", "weight")
        merges[f"{name}.{parameter}"] = (
            _linear(module, adapter) if parameter == "weight" else _fused_experts(module, adapter)
        )
    return merges


def _linear(module: "LoraLayer", adapter: str) -> MergeFunction:
    def merged(weight: "torch.Tensor") -> "torch.Tensor":  # (out, in)
        a = module.lora_A[adapter].weight.float()  # (r, in)
        b = module.lora_B[adapter].weight.float()  # (out, r)
        value = (b @ a).mul_(module.scaling[adapter]).add_(weight)
        if module.use_dora[adapter]:
            magnitude = module.lora_magnitude_vector[adapter].weight.float()  # (out,)
            value = value * (magnitude / value.norm(dim=1))[:, None]
        return value

    return merged


def _saved(name: str, module: "ModulesToSaveWrapper", seen: set[int]) -> dict[str, MergeFunction]:
    """The merges of a module trained in full; without originals in `seen`, which tied ones are."""
    [trained] = module.modules_to_save.values()
    copies = dict(trained.named_parameters())
    merges: dict[str, MergeFunction] = {}
    for inner, original in module.original_module.named_parameters():
        if id(original) not in seen:
            seen.add(id(original))
            merges[f"{name}.{inner}"] = partial(_replaced, by=copies[inner])
    return merges


def _replaced(weight: "torch.Tensor", *, by: "torch.nn.Parameter") -> "torch.Tensor":
    assert weight.shape == by.shape
    return by.detach().float()


def _fused_experts(module: "LoraLayer", adapter: str) -> MergeFunction:
    def merged(weight: "torch.Tensor") -> "torch.Tensor":  # (E, out, in)
        experts = module.num_experts
        a = module.lora_A[adapter].weight.float()  # (E·r, in)
        b = module.lora_B[adapter].weight.float()  # (out, r·E)
        a = a.reshape(experts, -1, a.shape[-1])  # (E, r, in)
        b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # (E, out, r)
        return (b @ a).mul_(module.scaling[adapter]).add_(weight)

    return merged
