"""The status of a running job, as sinks read it."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

WAITING = "waiting"
"""The stage before the first one, while another job holds the output."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A logged training step."""

    step: int
    steps: int
    """Steps of the whole training."""
    epoch: float
    loss: float
    learning_rate: float
    learning_rates: Mapping[str, float] | None = None
    """By group of weights, if not all have the same."""
    grad_norm: float
    tokens_per_second: float
    """Of all processes."""
    tflops: float | None = None
    """TFLOP/s of each device, by the model's operations; None on a CPU."""
    mfu: float | None = None
    """The same as a share of the device's bf16 peak, 0 to 1; None if the peak is not known."""
    data_wait_seconds: float
    """Time per step spent waiting for batches, averaged since the previous log."""
    data_wait_share: float
    """Share of the time since the previous log, 0 to 1."""
    memory_bytes: int
    seconds: float
    left_seconds: float


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The metrics of one validation, after a training step."""

    step: int
    epoch: float
    metrics: Mapping[str, float]
    """`eval_loss`, and `eval_cer` etc. if answers were generated. Never NaN in a best one."""
    seconds: float
    best: bool
    """Whether no earlier validation was as good."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    name: str
    version: str
    state: str = "running"
    """`running`, `succeeded`, `failed` or `preempted`, as in `run.json`."""
    stage: str | None = None
    """The running stage, or `waiting` for a job that still holds the output."""
    finished: Mapping[str, float] = field(default_factory=dict)
    """Seconds by finished stage; 0 for one that was complete before."""
    step: Step | None = None
    validation: Validation | None = None
    """The latest."""
    best: Validation | None = None
    """The best so far."""
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """`baseline` and `final`, by metric."""
    updated: float = 0.0
    """Seconds since the epoch."""


class Status:
    """The current snapshot; written by the job, read by sink threads."""

    def __init__(self, name: str, version: str) -> None:
        self._lock = threading.Lock()
        self._snapshot = Snapshot(name=name, version=version, updated=time.time())

    @property
    def snapshot(self) -> Snapshot:
        with self._lock:
            return self._snapshot

    def start_waiting(self) -> None:
        """Records that another job holds the output."""
        self._set(stage=WAITING)

    def end_waiting(self) -> None:
        self._set(stage=None)

    def start_stage(self, stage: str) -> None:
        self._set(stage=stage)

    def finish_stage(
        self, stage: str, seconds: float, metrics: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Records that a stage is complete; `metrics` are all known so far."""
        finished = {**self.snapshot.finished, stage: seconds}
        self._set(stage=None, finished=finished, metrics=dict(metrics))

    def set_step(self, step: Step) -> None:
        self._set(step=step)

    def set_validation(self, validation: Validation) -> None:
        if validation.best:
            self._set(validation=validation, best=validation)
        else:
            self._set(validation=validation)

    def end(self, state: str) -> None:
        self._set(state=state, stage=None)

    def _set(self, **changes: object) -> None:
        with self._lock:
            self._snapshot = replace(self._snapshot, **changes, updated=time.time())  # type: ignore[arg-type]
