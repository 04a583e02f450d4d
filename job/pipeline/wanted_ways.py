"""Which ways to compute a job may use, so that no others are tried."""

from collections.abc import Collection

from job.engines import ways
from job.engines.device import EIGHT_BIT
from job.spec.types import JobSpec
from job.train.capture_choice import why_eager
from job.train.compile_choice import may_pay, why_uncompiled


def wanted(
    spec: JobSpec, *, dtypes: Collection[str], trains: bool, patches_forward: bool = False
) -> tuple[str, ...]:
    """The names of the trials whose ways the spec allows on a GPU.

    `dtypes` are those that weights are loaded in. `trains` tells whether a training is to come;
    `patches_forward` whether its engine replaces the model's forward passes.
    """
    train = spec.train
    captures = why_eager(spec, on_gpu=True, padding_free=train.padding_free) is None
    compiles = train.torch_compile == "auto" and (
        why_uncompiled(spec, on_gpu=True, patches_forward=patches_forward) is None
        and may_pay(train)
    )
    wants = {
        **{
            ways.grouped(kernel, dtype): dtype in dtypes
            for dtype in ways.DTYPES
            for kernel in ways.KERNELS
        },
        ways.CAPTURED: trains and captures and not patches_forward,
        ways.COMPILED: trains and (compiles or train.torch_compile is True),
        ways.EIGHT_BIT: trains and train.optim in ("auto", *EIGHT_BIT) and not spec.shards_weights,
        ways.FOUR_BIT: spec.model.load_in_4bit,
    }
    return tuple(name for name in ways.TRAINING if wants.get(name, True))
