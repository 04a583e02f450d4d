"""`torch.compile` of a model's blocks, one by one: equal blocks share one compiled function.

Blocks are the units of gradient checkpointing: decoder layers, and those of vision towers. They are
compiled in place, so that weights keep their names, and for dynamic shapes.
"""

from dataclasses import dataclass

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.utils import fresh_cache
from transformers.modeling_layers import GradientCheckpointingLayer

from job.engines.fused_lora import FusedLora, fuse_adapters
from job.errors import SpecError

FIELD = "$.train.torch_compile"
MAX_RECOMPILES = 32
"""How often one function is recompiled before it runs eagerly. Rows with and without images, one
row or several, padded or not, and each kind of layer need their own graph.
"""


def require(device: torch.device) -> None:
    """Compiles one line for the device. Raises SpecError if that is not possible."""
    try:
        # A cached result proves nothing about the compiler that is installed now.
        with fresh_cache():
            torch.compile(_twice)(torch.ones(8, device=device))
    except TorchDynamoException as error:
        reason = str(error).partition("\n")[0]
        raise SpecError(
            FIELD,
            f"is not possible on this machine: {reason}",
            value=True,
            fix="set train.torch_compile: false, or install a C++ compiler (gcc and g++) and the "
            "Python headers; this project's images have neither",
        ) from error


def _twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


@dataclass(frozen=True)
class CompiledBlocks:
    """What `compile_blocks` changed in a model, and the way back."""

    blocks: tuple[GradientCheckpointingLayer, ...]
    fused: FusedLora | None
    """The adapters that were fused into their layers, if any."""

    def __len__(self) -> int:
        return len(self.blocks)

    def release(self) -> None:
        """Makes the blocks run eagerly again: generation would trigger compilations of its own."""
        for block in self.blocks:
            block._compiled_call_impl = None
        if self.fused is not None:
            self.fused.release()


def compile_blocks(
    model: torch.nn.Module, backend: str = "inductor", *, fuse: bool = True
) -> CompiledBlocks:
    """Has each block compiled at its first call, with its adapters.

    `fuse` says whether adapters may be fused into their layers' matrices: not under autocast, which
    chooses the dtype of each operation.
    """
    torch._dynamo.config.recompile_limit = MAX_RECOMPILES
    # An adapter's scaling is a constant; as an input of the blocks it would be a kernel in each.
    torch._dynamo.config.specialize_float = True
    blocks = tuple(
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    )
    fused = fuse_adapters(model, blocks) if fuse else None
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    return CompiledBlocks(blocks, fused)
