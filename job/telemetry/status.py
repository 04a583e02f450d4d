"""What there is to tell of a running job."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step, as it was logged."""

    step: int
    steps: int
    """At which training ends."""
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    data_wait_seconds: float
    """A step that the training waited for its batches, the mean since the log before."""
    data_wait_share: float
    """Of the time since the log before, 0 to 1."""
    memory_bytes: int
    seconds: float
    left_seconds: float


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    name: str
    version: str
    state: str = "running"
    """`running`, `succeeded`, `failed` or `preempted`, as in `run.json`."""
    stage: str | None = None
    finished: Mapping[str, float] = field(default_factory=dict)
    """Seconds that each finished stage took; 0 for one that was complete before."""
    step: Step | None = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """`baseline` and `final`, each by metric."""
    updated: float = 0.0
    """Seconds since the epoch."""


class Status:
    """The present snapshot; written by the job, read by threads."""

    def __init__(self, name: str, version: str) -> None:
        self._lock = threading.Lock()
        self._now = Snapshot(name=name, version=version, updated=time.time())

    @property
    def now(self) -> Snapshot:
        with self._lock:
            return self._now

    def enter(self, stage: str) -> None:
        self._set(stage=stage)

    def finish(
        self, stage: str, seconds: float, metrics: Mapping[str, Mapping[str, float]]
    ) -> None:
        """A stage is done, or was found complete; `metrics` are all that are known by now."""
        finished = {**self.now.finished, stage: seconds}
        self._set(stage=None, finished=finished, metrics=dict(metrics))

    def tell(self, step: Step) -> None:
        self._set(step=step)

    def end(self, state: str) -> None:
        self._set(state=state, stage=None)

    def _set(self, **changes: object) -> None:
        with self._lock:
            self._now = replace(self._now, **changes, updated=time.time())  # type: ignore[arg-type]
