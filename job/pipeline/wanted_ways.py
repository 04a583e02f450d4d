"""Which ways to compute a job may use, so that no others are tried."""

from job.engines import ways
from job.engines.device import EIGHT_BIT
from job.spec.types import JobSpec
from job.train.capture_choice import why_eager
from job.train.compile_choice import why_uncompiled


def wanted(spec: JobSpec, *, trains: bool, patches_forward: bool = False) -> tuple[str, ...]:
    """The names of the trials whose ways the spec allows on a GPU.

    `trains` tells whether a training is to come; `patches_forward` whether its engine replaces the
    model's forward passes.
    """
    train = spec.train
    captures = why_eager(spec, on_gpu=True, padding_free=train.padding_free) is None
    compiles = train.torch_compile == "auto" and (
        why_uncompiled(spec, on_gpu=True, patches_forward=patches_forward) is None
    )
    wants = {
        ways.CAPTURED: trains and captures and not patches_forward,
        ways.COMPILED: trains and (compiles or train.torch_compile is True),
        ways.EIGHT_BIT: trains
        and train.optim in ("auto", *EIGHT_BIT)
        and spec.runtime.distributed != "fsdp2",
        ways.FOUR_BIT: spec.model.load_in_4bit,
    }
    return tuple(name for name in ways.TRAINING if wants.get(name, True))
