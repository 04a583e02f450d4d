"""Estimates the peak memory of training on one device, part by part.

Static parts (weights, gradients, optimizer states) are counted. Activation memory comes from the
family, which knows the shapes. The peak is at the start of the backward pass, when all
activations are alive and the first gradients appear.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from job.engines.device import (
    Accelerator,
    four_bit_settings,
    is_plain,
    resolve_autocast,
    resolve_dtype,
)
from job.engines.lora_config import ADAPTERS
from job.engines.padding_free import why_padded
from job.families.activation_memory import VARLEN, StepSettings
from job.families.base import Family
from job.families.encoded import RowSize
from job.families.four_bit import BLOCK
from job.families.four_bit.packed_weights import packed_names
from job.families.lora.parameter_counts import stored_zeros, trained_parameters
from job.families.lora.patterns import max_rank
from job.families.lora.selection import trained_in_full
from job.spec.types import JobSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FP32, BF16 = 4, 2
EXPERT_DIMENSIONS = 3
"""Of a layer's routed experts in one parameter (E, out, in)."""
STACK_COPIES = 3
"""Of experts that are read one by one and stacked: the experts, the stack, and a part of either
that is being made; 2.5 were measured."""

PROCESS = 4 * 2**30
"""Allowance for Python with its libraries, and rows being loaded."""

CONTEXT = int(1.5 * 2**30)
"""The GPU's runtime: its context with loaded kernels (0.4 to 0.6 GiB on the GPUs listed),
workspaces of the matrix libraries, and fragmentation in the allocator. An allowance."""

UNCERTAINTY = 0.15
"""The relative error of estimates: kernels save different tensors, and allocators fragment
differently. `tests/unit/planning/test_memory.py` compares estimates with measurements."""

OPTIMIZER_STATE_BYTES = {
    "auto": 8,  # 2 if bitsandbytes is installed
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,  # pages go to the host only when the device is full
    "adafactor": 4,  # a row and a column per matrix; little less than this for few rows
    "sgd": 0,
}
"""Optimizer states per trained weight: AdamW's two moments in fp32, or in 8 bits."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the device at the peak of a training step."""

    weights: int
    """The model's, in the dtype that it trains in; router gates in fp32."""
    adapter: int
    """In fp32, like its gradients, plus the copy that its layers compute with; 0 for a full
    fine-tune."""
    gradients: int
    optimizer: int
    """Optimizer states."""
    activations: int
    """Activation memory, without attention and logits."""
    attention: int
    logits: int
    """Of the supervised tokens, with their log-probabilities and gradients."""
    working: int
    """One layer's temporary tensors; with checkpointing, the recomputed layer; of a base in 4 bits,
    the largest weight as it is unpacked; of sharded weights, what is gathered of them."""
    context: int
    loading: int = 0
    """Before the peak: a process's shards of the weights, and the largest tensor that is read whole
    to be converted; of random weights all, which are sharded afterwards. 0 if weights are not
    sharded."""

    @property
    def parts(self) -> dict[str, int]:
        """The parts of the peak."""
        return {name: count for name, count in vars(self).items() if name != "loading"}

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def fits(self, memory_bytes: int) -> bool:
        return max(self.total, self.loading) <= memory_bytes

    def is_ruled_out(self, memory_bytes: int) -> bool:
        """Whether it would not fit even if the estimate were too high by twice its error."""
        fixed = self.weights + self.adapter + self.gradients + self.optimizer
        return fixed + (1 - 2 * UNCERTAINTY) * (self.total - fixed) > memory_bytes

    def is_safe(self, memory_bytes: int) -> bool:
        """Whether it would fit even if the estimate were too low by twice its error."""
        fixed = self.weights + self.adapter + self.gradients + self.optimizer
        return fixed + (1 + 2 * UNCERTAINTY) * (self.total - fixed) <= memory_bytes

    def is_tight(self, memory_bytes: int) -> bool:
        """Whether the verdict is within the estimate's uncertainty."""
        fixed = self.weights + self.adapter + self.gradients + self.optimizer
        spread = UNCERTAINTY * (self.total - fixed)
        return abs(self.total - memory_bytes) <= spread


def estimate(
    family: type[Family],
    model: "PreTrainedModel",
    spec: JobSpec,
    rows: Sequence[RowSize],
    accelerator: Accelerator,
    *,
    varlen: bool | None = None,
    processes: int = 1,
) -> MemoryEstimate | None:
    """Peak memory with a micro-batch of these rows; None if the family cannot estimate it.

    `model` is the architecture on the meta device. `train.gradient_checkpointing: auto` counts as
    true, which needs the least. `varlen` tells whether the device's trial took variable-length
    attention; None if it was not tried, as in a plan. `processes` divide what a spec shards.
    """
    full = spec.lora.method == "full"
    dtype = resolve_dtype(spec.model, spec.lora, accelerator)
    step = _step(family, spec, accelerator, varlen)
    trained, count, gate_up = _trained(family, model, spec)
    step = replace(step, gate_up_adapters=ADAPTERS if gate_up else 1)
    saved = family.activation_memory(model.config, trained, rows, step)
    if saved is None:
        return None
    sharded = spec.shards_weights
    shards = processes if sharded else 1
    reduced = shards
    if not full and spec.train.gradient_accumulation_steps > 1:
        reduced = 1  # an adapter's gradients wait, whole, for the last micro-batch of the step
    weights = weight_bytes(family, model, dtype.itemsize, spec)
    copies = 0
    if step.autocast and dtype.itemsize == FP32 and not (sharded and step.checkpointing):
        # Autocast keeps a copy until the backward pass is over.
        copies = BF16 * sum(parameter.numel() for parameter in model.parameters())
    working = saved.workspace + saved.recomputed + _unpacked_bytes(model, dtype.itemsize, spec)
    context = PROCESS if accelerator.kind == "cpu" else CONTEXT
    # LoRA layers compute with a copy.
    copy = count * step.itemsize if step.lora_linear and step.itemsize != FP32 else 0
    return MemoryEstimate(
        weights=math.ceil(weights / shards) + copies,
        adapter=0 if full else math.ceil(count * FP32 / shards) + copy,
        gradients=math.ceil(count * (dtype.itemsize if full else FP32) / reduced),
        optimizer=math.ceil(count * OPTIMIZER_STATE_BYTES[spec.train.optim] / shards),
        activations=saved.activations,
        attention=saved.attention,
        logits=saved.logits,
        working=working + (_gathered_bytes(model, dtype.itemsize, spec, step) if sharded else 0),
        context=context,
        loading=_loading_bytes(model, dtype.itemsize, weights, shards, spec) + context
        if sharded
        else 0,
    )


def _step(
    family: type[Family], spec: JobSpec, accelerator: Accelerator, varlen: bool | None
) -> StepSettings:
    """The settings that determine which activations a step saves on this device."""
    dtype = resolve_dtype(spec.model, spec.lora, accelerator)
    autocast = resolve_autocast(spec.model, spec.lora, accelerator)
    width = BF16 if autocast else dtype.itemsize
    on_gpu = accelerator.kind != "cpu"
    experts: str = spec.model.experts_implementation
    if experts == "auto":
        experts = family.experts_on_gpu if on_gpu else "eager"
    packed = why_padded(spec, family, patches_forward=spec.model.engine == "unsloth") is None
    attention: str = spec.model.attn_implementation
    if attention == "auto":
        if varlen is None:  # measured on CUDA; on ROCm the padded grid, which needs more
            varlen = accelerator.kind == "cuda"
        attention = VARLEN if varlen and on_gpu and width == BF16 and packed else "sdpa"
    return StepSettings(
        itemsize=width,
        autocast=autocast,
        packed=packed,
        checkpointing=spec.train.gradient_checkpointing is not False,
        attention=attention,
        experts=experts,
        rank=0 if spec.lora.method == "full" else max_rank(spec.lora),
        lora_linear=is_plain(spec.lora),
        dropout=0 if not spec.lora.lora_dropout else 1 if on_gpu else FP32,
    )


def _trained(
    family: type[Family], model: "PreTrainedModel", spec: JobSpec
) -> tuple[set[str], int, bool]:
    """The modules and parameters that train or have adapters; the number of trained weights, with
    the zeros that are stored among them; and whether gate and up have an adapter each."""
    if spec.lora.method == "full":
        names = {name for name, _ in model.named_modules()}
        names |= {name for name, _ in model.named_parameters()}
        return names, sum(parameter.numel() for parameter in model.parameters()), False
    targets = family.lora_targets(model, spec.lora)
    saved = trained_in_full(model, targets)
    names = {*targets.modules, *targets.parameters, *targets.saved_modules, *saved}
    zeros = stored_zeros(model, targets, spec.lora)
    count = trained_parameters(model, targets, spec.lora) + zeros
    return names, count, bool(targets.gate_up)


def weight_bytes(
    family: type[Family], model: "PreTrainedModel", width: int, spec: JobSpec | None = None
) -> int:
    """The model's weights at `width` bytes each, except those that always stay in fp32, and those
    that the spec packs into 4 bits."""
    four_bit = None if spec is None else four_bit_settings(spec.model, spec.lora)
    packed = {} if four_bit is None else packed_names(model, four_bit)
    return sum(
        four_bit.packed_bytes(parameter.numel())
        if four_bit is not None and name in packed
        else parameter.numel() * (FP32 if family.keeps_fp32(name) else width)
        for name, parameter in model.named_parameters()
    )


def _unpacked_bytes(model: "PreTrainedModel", width: int, spec: JobSpec) -> int:
    """The largest weight that a product unpacks, and the fp32 scales of its blocks."""
    four_bit = four_bit_settings(spec.model, spec.lora)
    if four_bit is None:
        return 0
    sizes = (parameter.numel() for parameter in packed_names(model, four_bit).values())
    return int(max(sizes, default=0) * (width + FP32 / BLOCK))


def _gathered_bytes(model: "PreTrainedModel", width: int, spec: JobSpec, step: StepSettings) -> int:
    """What FSDP2 gathers at one time: the weights of the current block, of the next one, which it
    prefetches, and of all that is in no block. If the weights are trained, also their gradients,
    twice while they are reduced. An adapter's weights are too small to count."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    outside = sum(parameter.numel() for parameter in model.parameters()) - sum(sizes)
    block = max(sizes, default=0)
    if spec.lora.method != "full":
        return block * 2 * width + outside * width
    copies = BF16 if step.autocast else 0
    return block * (4 * width + copies) + outside * 2 * width


def _loading_bytes(
    model: "PreTrainedModel", width: int, weights: int, shards: int, spec: JobSpec
) -> int:
    """What a process holds of sharded weights while it loads them; all are `weights` bytes.

    Experts that are stored one by one are read whole and stacked. Those of one name in a layer may
    be stored together, as ERNIE-4.5-VL's text and vision experts are.
    """
    if not spec.reads_shards_only:
        return weights
    stacks: dict[tuple[str, str], int] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == EXPERT_DIMENSIONS and (layer := re.match(r"\D*\d+\.", name)):
            stack = layer[0], name.rpartition(".")[2]
            stacks[stack] = stacks.get(stack, 0) + parameter.numel()
    return math.ceil(weights / shards) + STACK_COPIES * width * max(stacks.values(), default=0)


def longest(model: "PreTrainedModel", spec: JobSpec) -> RowSize:
    """The row of `train.max_length` tokens that takes the most memory: as much image as possible.

    If `data.max_pixels` limits it, the rest is text.
    """
    tokens = spec.train.max_length
    vision: Any = getattr(model.config, "vision_config", None)
    if not hasattr(vision, "spatial_merge_size"):  # text-only, or other image patches
        return RowSize(tokens=tokens, image_tokens=0, supervised_tokens=tokens, patches=())
    merge, area = vision.spatial_merge_size**2, vision.patch_size**2
    image_tokens = tokens
    if spec.data.max_pixels is not None:
        image_tokens = min(tokens, spec.data.max_pixels // area // merge)
    return RowSize(
        tokens=tokens,
        image_tokens=image_tokens,
        supervised_tokens=tokens,
        patches=(image_tokens * merge,),
    )
