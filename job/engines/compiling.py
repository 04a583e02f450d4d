"""Regional `torch.compile`: block by block, so that equal blocks share one compiled function.

Blocks are the units of gradient checkpointing: decoder layers and vision blocks. They are compiled
in place, so that weights keep their names, and for dynamic shapes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.fx.experimental._config as shape_config
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.utils import fresh_cache
from transformers.modeling_layers import GradientCheckpointingLayer

from job.engines.fused_lora import FusedLora, fuse_adapters
from job.errors import SpecError

FIELD = "$.train.torch_compile"
MAX_RECOMPILES = 32
"""How often a function may be recompiled before dynamo falls back to eager. Batches with and
without images, of one row or several, padded or not, and each kind of layer need their own graph.
"""


def require(device: torch.device) -> None:
    """Raises SpecError if nothing can be compiled for the device."""
    if (found := obstacle(device)) is not None:
        raise SpecError(
            FIELD,
            f"is {found}",
            value=True,
            fix="set train.torch_compile: auto or false, or install a C++ compiler (gcc and g++) "
            "and the Python headers, as this project's cuda and rocm images have them",
        )


def obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled for the device, by compiling a trivial function; None if it
    can."""
    try:
        # A cached result proves nothing about the compiler that is installed now. Below the cache,
        # as what the blocks load: the temporary folder may be mounted noexec.
        with fresh_cache(dir=cache_dir()):
            torch.compile(_twice)(torch.ones(8, device=device))
    except TorchDynamoException as error:
        reason = str(error).partition("\n")[0]
        return f"not possible on this machine: {reason}"
    return None


def _twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


@dataclass(frozen=True)
class CompiledBlocks:
    """The compiled blocks of a model; `release` undoes `compile_blocks`."""

    blocks: tuple[GradientCheckpointingLayer, ...]
    fused: FusedLora | None
    """The adapters that were fused into their layers, if any."""

    def __len__(self) -> int:
        return len(self.blocks)

    @contextmanager
    def eager(self) -> Iterator[None]:
        """A context in which the blocks run eagerly: evaluation mode without gradients would need
        compilations of its own, which take longer than they save."""
        compiled = [block._compiled_call_impl for block in self.blocks]
        for block in self.blocks:
            block._compiled_call_impl = None
        try:
            yield
        finally:
            for block, implementation in zip(self.blocks, compiled, strict=True):
                block._compiled_call_impl = implementation

    def release(self) -> None:
        """Makes the blocks run eagerly again: generation would trigger more compilations."""
        for block in self.blocks:
            block._compiled_call_impl = None
        if self.fused is not None:
            self.fused.release()


def compile_blocks(
    model: torch.nn.Module, backend: str = "inductor", *, fuse: bool = True
) -> CompiledBlocks:
    """Marks each block, with its adapters, for compilation at its first call.

    `fuse` allows fusing adapters into their layers' matrices; it must be off under autocast, which
    chooses a dtype for each operation.
    """
    torch._dynamo.config.recompile_limit = MAX_RECOMPILES
    # Makes an adapter's scaling a constant; as a graph input it would cost a kernel in each block.
    torch._dynamo.config.specialize_float = True
    # Else sizes that are equal by chance at first, such as rows and half a head, must always be.
    shape_config.use_duck_shape = False
    blocks = tuple(
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    )
    fused = fuse_adapters(model, blocks) if fuse else None
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    return CompiledBlocks(blocks, fused)
