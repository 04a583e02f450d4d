"""`torch.compile` of a model's blocks, each by itself: equal ones are compiled once for all.

Blocks are what gradient checkpointing computes again: decoder layers, and those of vision towers.
They are compiled in place, so that names of weights stay, and for sizes that change.
"""

from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.utils import fresh_cache
from transformers.modeling_layers import GradientCheckpointingLayer

from job.engines.fused_lora import Laying, lay
from job.errors import SpecError

FIELD = "$.train.torch_compile"
MOST = 32
"""How often one function is compiled anew; beyond that it runs as it is written. Rows with and
without pictures, one row or several, padded or not, and each kind of layer ask for their own.
"""


def require(device: torch.device) -> None:
    """Compiles a line for the device, as a trial. Raises SpecError where that is not possible."""
    try:
        # What was compiled on this machine before, with the compiler of then, proves nothing.
        with fresh_cache():
            torch.compile(_twice)(torch.ones(8, device=device))
    except TorchDynamoException as error:
        reason = str(error).partition("\n")[0]
        raise SpecError(
            FIELD,
            f"is not possible on this machine: {reason}",
            value=True,
            fix="set train.torch_compile: false, or install a C++ compiler (gcc and g++) and the "
            "headers of Python; the images of this project have neither",
        ) from error


def _twice(x: torch.Tensor) -> torch.Tensor:
    return x + x


def compile_blocks(model: Any, backend: str = "inductor", *, wide: bool = True) -> int:
    """Compiles each block when it is first called, adapters and all; gives their number.

    `wide` says whether adapters may be laid into their layers' own matrices: not where autocast
    chooses what is computed in which dtype.
    """
    torch._dynamo.config.recompile_limit = MOST
    # An adapter's scaling is one number; as an input of blocks it would be a kernel in each.
    torch._dynamo.config.specialize_float = True
    blocks = _blocks(model)
    if wide:
        model.laying = lay(model, blocks)
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    return len(blocks)


def release_blocks(model: Any) -> None:
    """Lets the blocks run as they are written again: generation would ask for shapes of its own."""
    for block in _blocks(model):
        block._compiled_call_impl = None
    laying: Laying | None = getattr(model, "laying", None)
    if laying is not None:
        laying.release()
        model.laying = None


def _blocks(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
