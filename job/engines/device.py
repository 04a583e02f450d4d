"""The accelerator (CUDA, ROCm or CPU), and the dtype, autocast and optimizer chosen for it."""

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from job.distributed.cores import cores
from job.engines import cpu
from job.errors import SpecError, UsageError
from job.families.four_bit import FourBit
from job.spec.types import LoraSpec, ModelSpec, RuntimeSpec, TrainSpec

if TYPE_CHECKING:
    import torch

Kind = Literal["cpu", "cuda", "rocm"]
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables that configure PyTorch's GPU allocator."""
BUILDS: Mapping[str, str] = {"rocm": "ROCm", "cuda": "CUDA", "cpu": "CPU"}
TRY_AGAIN = "after a repair, python -m job doctor tries it anew and keeps the result"
EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    kind: Kind
    name: str
    memory_bytes: int
    """Memory of one GPU, or the host memory that this process may use."""
    cores: int | None = None
    """CPU cores that this process may use; None for a GPU."""
    index: int = 0
    """The device's index on its machine."""

    @property
    def device(self) -> "torch.device":
        import torch

        return torch.device("cpu" if self.kind == "cpu" else f"cuda:{self.index}")

    def peak_memory_bytes(self) -> int:
        """Peak memory since `reset_peak_memory`: of the GPU, or of this process."""
        if self.kind == "cpu":
            return cpu.peak_memory()
        import torch

        return int(torch.cuda.max_memory_reserved(self.index))

    def reset_peak_memory(self) -> None:
        """Resets the peak to current use; on a CPU, only if the kernel supports it."""
        if self.kind == "cpu":
            cpu.reset_peak_memory()
            return
        import torch

        torch.cuda.empty_cache()  # cached blocks would count as used
        torch.cuda.reset_peak_memory_stats(self.index)


def build() -> Kind:
    """What torch is built for: a name for specs and messages, from which nothing else follows.

    Which way computes a step is found by trying (`job.engines.ways`).
    """
    import torch

    return "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"


def detect(runtime: RuntimeSpec, index: int = 0) -> Accelerator:
    """The accelerator to use; `index` is this process's local rank.

    Raises SpecError if the spec names one that this machine lacks, and UsageError if there are more
    processes than GPUs.
    """
    import torch

    available = build() if torch.cuda.is_available() else "cpu"
    if runtime.accelerator not in ("auto", "cpu", available):
        raise SpecError(
            "$.runtime.accelerator",
            f"this machine has none; torch {torch.__version__} ({BUILDS[build()]} build) sees "
            f"{torch.cuda.device_count()} GPUs",
            value=runtime.accelerator,
            fix="set it to auto, or install that build: make setup ACCELERATOR=…",
        )
    if available == "cpu" or runtime.accelerator == "cpu":
        return Accelerator(
            kind="cpu", name=cpu.model(), memory_bytes=cpu.memory_limit(), cores=cores()
        )
    if index >= torch.cuda.device_count():
        raise UsageError(
            "LOCAL_RANK",
            f"this machine has {torch.cuda.device_count()} GPUs, and each process needs one",
            value=index,
            fix="start as many processes on a node as it has GPUs: torchrun --nproc-per-node gpu",
        )
    if available == "cuda" and not any(name in os.environ for name in ALLOCATOR):
        # Batches of many sizes fragment memory; expandable segments avoid that. PyTorch reads the
        # variable once, when it initializes CUDA.
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    torch.cuda.set_device(index)
    return gpu(index)


def gpu(index: int) -> Accelerator:
    """A GPU that torch sees."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    allowed = torch.cuda.get_per_process_memory_fraction(index)  # 1 unless something has set it
    memory = int(properties.total_memory * allowed)
    return Accelerator(kind=build(), name=properties.name, memory_bytes=memory, index=index)


def release_memory() -> None:
    """Collects garbage and empties the GPU allocator's cache."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def resolve_dtype(model: ModelSpec, lora: LoraSpec, accelerator: Accelerator) -> "torch.dtype":
    """The dtype of the weights in memory: the spec's or, for `auto`, by device and method.

    `auto` is fp32 on a CPU. On a GPU it is bf16 if only an adapter is trained, and fp32 if weights
    of the model itself are, because updates are often too small for bf16.
    """
    import torch

    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    exact = accelerator.kind == "cpu" or trains_weights(lora)
    return torch.float32 if exact else torch.bfloat16


def resolve_autocast(model: ModelSpec, lora: LoraSpec, accelerator: Accelerator) -> bool:
    """Whether training computes in bf16 regardless of the weights' dtype.

    Only on a GPU, and unless the spec sets a dtype other than bf16. A plain adapter does not need
    autocast: its layers compute in their base layer's bf16 (`job.families.lora.linear`).
    """
    if accelerator.kind == "cpu" or model.dtype not in ("auto", "bfloat16"):
        return False
    return trains_weights(lora) or not is_plain(lora)


def trains_weights(lora: LoraSpec) -> bool:
    """Whether weights of the model itself are trained: all of them, or biases with an adapter."""
    return lora.method == "full" or lora.bias != "none"


def is_plain(lora: LoraSpec) -> bool:
    """Whether the adapter is plain LoRA: no DoRA, no dropout."""
    return not lora.use_dora and not lora.lora_dropout


def resolve_optim(
    train: TrainSpec,
    accelerator: Accelerator,
    eight_bit_obstacle: str | None = None,
    *,
    section: str = "train",
) -> str:
    """The optimizer's name for Transformers.

    `eight_bit_obstacle` is why 8-bit optimizers failed their trial; None if they passed, or were
    not tried. Raises SpecError, naming a substitute, if this machine does not support the
    optimizer, which is that of the spec's `section`.
    """
    substitute = "adamw_torch" if accelerator.kind == "cpu" else "adamw_torch_fused"
    eight_bit = accelerator.kind != "cpu" and _has_bitsandbytes() and eight_bit_obstacle is None
    if train.optim == "auto":
        return "adamw_8bit" if eight_bit else substitute
    if train.optim in EIGHT_BIT and not eight_bit:
        reason = "8-bit optimizers need the package bitsandbytes (make setup EXTRAS=gpu)"
        if accelerator.kind == "cpu":
            reason = "8-bit optimizers need a GPU"
        elif _has_bitsandbytes():
            reason = f"8-bit optimizers failed their trial on this GPU: {eight_bit_obstacle}"
        raise SpecError(
            f"$.{section}.optim",
            reason,
            value=train.optim,
            fix=f"optim: {substitute} has the same update in fp32 state, or optim: auto chooses"
            + (f"; {TRY_AGAIN}" if eight_bit_obstacle else ""),
        )
    return train.optim


def require_four_bit(model: ModelSpec, obstacle: str | None = None) -> None:
    """Raises SpecError if the spec packs weights and bitsandbytes, which does it, is missing.

    `obstacle` says why packed weights do not work on this device; None if they do.
    """
    if not model.load_in_4bit:
        return
    reason = f"does not work on this device: {obstacle}"
    fix = f"remove the line; {TRY_AGAIN}"
    if not _has_bitsandbytes():
        reason = "needs the package bitsandbytes"
        fix = "install it, make setup EXTRAS=gpu, or remove the line"
    elif obstacle is None:
        return
    raise SpecError("$.model.load_in_4bit", reason, value=True, fix=fix)


def four_bit_settings(model: ModelSpec, lora: LoraSpec) -> FourBit | None:
    """How the spec packs frozen weights; None if it does not."""
    if not model.load_in_4bit:
        return None
    return FourBit(
        quant_type=model.bnb_4bit_quant_type,
        double_quant=model.bnb_4bit_use_double_quant,
        skip=tuple(lora.modules_to_save or ()),
    )


def _has_bitsandbytes() -> bool:
    from importlib.util import find_spec

    return find_spec("bitsandbytes") is not None
