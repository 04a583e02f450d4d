"""The most memory that training will take on one device, piece by piece, before anything runs.

Static parts are counted: so many weights of so many bytes. What a step keeps for its backward pass
comes from the family, which knows the shapes. The sum takes the worst moment, the turn from forward
to backward, when all activations are there and the first gradients join them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.engines.device import Accelerator, is_plain, resolve_autocast, resolve_dtype
from job.families.activation_memory import VARLEN, StepSettings
from job.families.base import Family, RowSize
from job.planning.sizes import GIB, trained_parameters
from job.spec.types import JobSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FP32, BF16 = 4, 2

PROCESS = 4 * GIB
"""Python with its libraries, and rows on their way. An allowance, not a calculation."""

CONTEXT = int(1.5 * GIB)
"""What a GPU's runtime takes for itself: its context with the loaded kernels (0.4 to 0.6 GiB on
the GPUs listed), workspaces of the matrix libraries, and blocks that the allocator cannot fill. An
allowance, not a calculation."""

UNCERTAINTY = 0.15
"""How far an estimate may be off: kernels differ in what they keep, and allocators in what they
lose. See the tests for what it was held against."""

OPTIMIZER = {
    "auto": 8,  # where bitsandbytes is installed it will be 2
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,  # pages go to the host only when the device is full
    "adafactor": 4,  # a row and a column a matrix; for matrices of few rows hardly less than this
    "sgd": 0,
}
"""Bytes of optimizer state for each trained weight: AdamW's two moments in fp32, or in 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device at the worst moment of training."""

    weights: int
    """The model's own, in the dtype that they are trained in; gates in fp32."""
    adapter: int
    """In fp32, as are its gradients, with the copy that its layers compute with; 0 where the
    weights are trained themselves."""
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps, without attention and logits."""
    attention: int
    logits: int
    """Of the supervised tokens, with their log-probabilities and gradients."""
    working: int
    """One layer's temporary tensors, and with checkpointing the layer that is made again."""
    context: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def fits(self, memory_bytes: int) -> bool:
        return self.total <= memory_bytes

    def is_tight(self, memory_bytes: int) -> bool:
        """Whether the estimate's own uncertainty decides."""
        fixed = self.weights + self.adapter + self.gradients + self.optimizer
        spread = UNCERTAINTY * (self.total - fixed)
        return abs(self.total - memory_bytes) <= spread


def estimate(
    family: type[Family],
    model: "PreTrainedModel",
    spec: JobSpec,
    rows: Sequence[RowSize],
    accelerator: Accelerator,
) -> Memory | None:
    """The memory that training takes with a batch of these rows; None where the family cannot tell.

    `model` is the architecture on the meta device.
    """
    full = spec.lora.method == "full"
    dtype = resolve_dtype(spec.model, spec.lora, accelerator)
    autocast = resolve_autocast(spec.model, spec.lora, accelerator)
    on_gpu = accelerator.kind != "cpu"
    weights = weight_bytes(family, model, dtype.itemsize)
    if full:
        trained = {name for name, _ in model.named_modules()}
        trained |= {name for name, _ in model.named_parameters()}
        count = sum(parameter.numel() for parameter in model.parameters())
    else:
        targets = family.lora_targets(model, spec.lora)
        trained = {*targets.modules, *targets.parameters}
        count = trained_parameters(model, targets, spec.lora)
    if autocast and dtype.itemsize == FP32:
        # Autocast keeps a copy until the backward pass is over.
        weights += BF16 * sum(parameter.numel() for parameter in model.parameters())
    width = BF16 if autocast else dtype.itemsize
    experts = spec.model.experts_implementation
    attention: str = spec.model.attn_implementation
    if attention == "auto":
        by_bounds = accelerator.kind == "cuda" and width == BF16 and spec.train.padding_free
        attention = VARLEN if by_bounds else "sdpa"
    saved = family.activation_memory(
        model.config,
        trained,
        rows,
        StepSettings(
            itemsize=width,
            autocast=autocast,
            packed=spec.train.padding_free,
            checkpointing=spec.train.gradient_checkpointing,
            attention=attention,
            experts=(family.experts_on_gpu if on_gpu else "eager")
            if experts == "auto"
            else experts,
            rank=0 if full else spec.lora.r,
            low_rank_linear=is_plain(spec.lora),
            dropout=0 if not spec.lora.lora_dropout else 1 if on_gpu else FP32,
        ),
    )
    if saved is None:
        return None
    copied = is_plain(spec.lora) and width != FP32  # its layers compute with a copy
    trained_width = dtype.itemsize if full else FP32
    return Memory(
        weights=weights,
        adapter=0 if full else count * (FP32 + (width if copied else 0)),
        gradients=count * trained_width,
        optimizer=count * OPTIMIZER[spec.train.optim],
        activations=saved.activations,
        attention=saved.attention,
        logits=saved.logits,
        working=saved.workspace + saved.recomputed,
        context=CONTEXT if on_gpu else PROCESS,
    )


def weight_bytes(family: type[Family], model: "PreTrainedModel", width: int) -> int:
    """The model's weights at `width` bytes each, but for those that stay fp32 in every dtype."""
    return sum(
        parameter.numel() * (FP32 if family.keeps_fp32(name) else width)
        for name, parameter in model.named_parameters()
    )


def longest(model: "PreTrainedModel", spec: JobSpec) -> RowSize:
    """The heaviest row that `train.max_length` lets through: nearly all of it a picture.

    Where `data.max_pixels` bounds pictures the rest is text.
    """
    tokens = spec.train.max_length
    vision: Any = getattr(model.config, "vision_config", None)
    if not hasattr(vision, "spatial_merge_size"):  # text alone, or pictures cut in another way
        return RowSize(tokens=tokens, image_tokens=0, trained=tokens, patches=())
    merge, area = vision.spatial_merge_size**2, vision.patch_size**2
    pictured = tokens
    if spec.data.max_pixels is not None:
        pictured = min(tokens, spec.data.max_pixels // area // merge)
    return RowSize(
        tokens=tokens, image_tokens=pictured, trained=tokens, patches=(pictured * merge,)
    )
