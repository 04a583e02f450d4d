"""Decides whether blocks are compiled, if the spec leaves it to the job."""

from dataclasses import dataclass, replace

from job import log
from job.spec.types import JobSpec, TrainSpec

COMPILE_SECONDS = 60
"""Time to compile the blocks. The first step took 32 to 46 s on an H200 with 28 layers, which share
compiled code; other kinds of batches are compiled later."""
MEASURED_BLOCKS = 60
"""Decoder layers and vision blocks of the model whose savings were measured."""
SAVED_A_PASS = 0.212
"""Seconds that compiled blocks save of a pass that waits for the host: 468 ms became 256 ms."""
SAVED_A_CAPTURED_PASS = 0.018
"""The same if the pass is captured as a graph, beside what they save of its tokens."""
MOST_BLOCKS = 256
"""More than a model has, to bound what is saved before one is known."""
SAVED_A_TOKEN = 22e-6
"""Seconds that they save of a pass that the device limits: with 9,694 tokens, 604 ms were 392."""


@dataclass(frozen=True, kw_only=True)
class CompileChoice:
    compiled: bool
    reason: str

    def __str__(self) -> str:
        return f"{'yes' if self.compiled else 'no'}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What a process computes in the steps of a training."""

    steps: int
    tokens_a_step: float
    blocks: int
    """Decoder layers and vision blocks."""
    captured: bool
    """Whether passes are replayed as graphs, so that none waits for the host."""

    @property
    def saved_seconds(self) -> float:
        """What compiled blocks save of the whole training, with one pass a step."""
        device = SAVED_A_TOKEN * self.tokens_a_step
        each = SAVED_A_CAPTURED_PASS + device if self.captured else max(SAVED_A_PASS, device)
        return self.steps * each * self.blocks / MEASURED_BLOCKS


def choose(
    spec: JobSpec, work: StepWork | None, *, on_gpu: bool, patches_forward: bool = False
) -> CompileChoice:
    """Whether to compile the blocks; if the choice is yes for `auto`, a compiler is still needed.

    `work` is None if it is unknown. `patches_forward` tells whether the engine replaces the model's
    forward passes.
    """
    if (wanted := spec.train.torch_compile) != "auto":
        return CompileChoice(compiled=wanted, reason="the spec says so")
    obstacle = why_uncompiled(spec, on_gpu=on_gpu, patches_forward=patches_forward)
    if obstacle is None and work is None:
        obstacle = "how much the training computes is unknown"
    if obstacle is not None or work is None:
        return CompileChoice(compiled=False, reason=obstacle or "")
    return CompileChoice(
        compiled=work.saved_seconds > COMPILE_SECONDS,
        reason=f"{work.steps:,} steps would save about {log.duration(work.saved_seconds)}, and "
        f"compiling takes about {log.duration(COMPILE_SECONDS)}",
    )


def may_pay(train: TrainSpec) -> bool:
    """Whether compiled blocks may save more than compiling takes, as far as the spec tells."""
    if train.max_steps < 0:  # they follow from the number of rows
        return True
    tokens = train.rows_a_step * train.max_length
    most = StepWork(steps=train.max_steps, tokens_a_step=tokens, blocks=MOST_BLOCKS, captured=False)
    saved = max(most.saved_seconds, replace(most, captured=True).saved_seconds)
    return saved > COMPILE_SECONDS


def why_uncompiled(spec: JobSpec, *, on_gpu: bool, patches_forward: bool = False) -> str | None:
    """Why `auto` compiles no blocks, whatever the training computes; None if it may."""
    train = spec.train
    reasons = {
        "there is no GPU": not on_gpu,
        "the engine has forward passes of its own": patches_forward,
        "weights in 4 bits are unpacked outside of compiled code": spec.model.load_in_4bit,
        "sharded blocks are not compiled in this version": spec.shards_weights,
        "gradient checkpointing excludes it": train.gradient_checkpointing is True,
        "train.fit is off, so no trial shows that they compile": train.fit == "off",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
