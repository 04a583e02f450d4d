"""The ways to compute an optimizer step, from fastest to slowest.

The spec's rows per micro-batch and accumulation steps define the rows of a step. A pass is a
forward and backward pass over one micro-batch; a step of 4 rows can be one pass, two or four.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from job.spec.types import TrainSpec

# Milliseconds of a pass on an H200 with 28 layers. Only their ratios count, and those do not depend
# on the number of layers: each adds to all of them.
LAUNCHED = 468
"""Of a small pass, however few tokens it has: the host launches kernels slower than they run."""
LAUNCHED_TWICE = 809
"""The same with gradient checkpointing."""
CAPTURED = 52
"""What a captured pass takes beside the time of its tokens: 85 ms for 531."""
CAPTURED_TWICE = CAPTURED * 4 / 3
"""The same with gradient checkpointing."""
A_TOKEN = 0.062
"""For each token, if the device is what limits the pass."""
A_RECOMPUTED_TOKEN = A_TOKEN * 4 / 3
"""With gradient checkpointing: a second forward pass takes a third of a pass."""
MAX_PASS_ROWS = 65_536
"""Rows of the largest pass: as many as train.per_device_train_batch_size can be."""


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """The spec's settings that divide the rows of a step into passes."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool

    @classmethod
    def of(cls, train: TrainSpec, *, checkpointing: bool | None = None) -> "BatchSettings":
        """The settings as the spec has them; `checkpointing` replaces `auto`."""
        wanted = train.gradient_checkpointing
        if wanted == "auto":
            assert checkpointing is not None, "auto is resolved by now"
            wanted = checkpointing
        return cls(
            per_device_train_batch_size=train.per_device_train_batch_size,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            gradient_checkpointing=wanted,
        )

    @property
    def rows(self) -> int:
        """Rows of a step in each process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def of_spec(self, train: TrainSpec) -> TrainSpec:
        """The spec's section with these settings."""
        return replace(train, **asdict(self))

    def __str__(self) -> str:
        rows, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        checkpointing = "with" if self.gradient_checkpointing else "without"
        return f"{rows} × {accumulation}, {checkpointing} gradient checkpointing"


PassTokens = Callable[[BatchSettings], float]
"""The mean number of tokens, padding included, that a pass of these settings computes."""


def searches(train: TrainSpec, *, on_gpu: bool, sharded: bool) -> bool:
    """Whether passes are searched for before step 1, or taken from the spec.

    A step that is sharded may fit only once it is.
    """
    return not sharded and (train.fit == "on" or (train.fit == "auto" and on_gpu))


def job_may_checkpoint(train: TrainSpec) -> bool:
    """Whether the job decides on gradient checkpointing; compiled blocks exclude it."""
    return train.gradient_checkpointing == "auto" and train.torch_compile is not True


def without_search(train: TrainSpec, is_safe: Callable[[BatchSettings], bool]) -> BatchSettings:
    """The spec's passes; with gradient checkpointing if the job decides on it and they are not
    safe to fit."""
    kept = BatchSettings.of(train, checkpointing=False)
    if not job_may_checkpoint(train):
        return kept
    return replace(kept, gradient_checkpointing=not is_safe(kept))


def candidates(
    train: TrainSpec, pass_tokens: PassTokens, *, on_gpu: bool, captured: bool
) -> Sequence[BatchSettings]:
    """The ways to compute the rows of the spec's step, from fastest to slowest.

    All that the spec allows: with `gradient_checkpointing: auto` both, unless it wants compiled
    blocks, which exclude checkpointing. `captured` tells whether passes can be captured as graphs.
    """
    wanted = train.gradient_checkpointing
    both = (False,) if train.torch_compile is True else (False, True)
    rows = train.rows_a_step
    every = [
        BatchSettings(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=rows // size,
            gradient_checkpointing=checkpointing,
        )
        for checkpointing in (both if wanted == "auto" else (wanted,))
        for size in _sizes(rows)
    ]

    def speed(each: BatchSettings) -> tuple[float, int]:
        taken = step_time(each, pass_tokens(each), on_gpu=on_gpu, captured=captured)
        return taken, each.gradient_accumulation_steps

    return sorted(every, key=speed)


def step_time(
    settings: BatchSettings, tokens: float, *, on_gpu: bool, captured: bool = False
) -> float:
    """The time of a step with `tokens` a pass, to be compared with that of others.

    On a CPU nothing is launched, so only the tokens count.
    """
    if settings.gradient_checkpointing:
        replayed, launched, busy = CAPTURED_TWICE, LAUNCHED_TWICE, A_RECOMPUTED_TOKEN * tokens
    else:
        replayed, launched, busy = CAPTURED, LAUNCHED, A_TOKEN * tokens
    each = busy
    if on_gpu and captured:
        each = replayed + busy
    elif on_gpu:
        each = max(launched, busy)
    # Rounded: about equal work in any number of passes counts as equally fast.
    return float(f"{settings.gradient_accumulation_steps * each:.2g}")


def _sizes(rows: int) -> list[int]:
    """Rows per pass to try, in descending order: each divides the rows of the step and is at most
    three quarters of the one before, and `MAX_PASS_ROWS`."""
    small = [size for size in range(1, math.isqrt(rows) + 1) if rows % size == 0]
    sizes: list[int] = []
    for size in sorted({*small, *(rows // size for size in small)}, reverse=True):
        if size <= (sizes[-1] * 3 / 4 if sizes else MAX_PASS_ROWS):
            sizes.append(size)
    return sizes
