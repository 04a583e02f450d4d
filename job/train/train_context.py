"""The inputs of a training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from job import telemetry
from job.engines.base import Engine
from job.engines.device import Accelerator
from job.engines.ways import Ways
from job.families.base import Family
from job.prep.prepared_data import PreparedData
from job.prep.rows import Row
from job.spec.types import JobSpec
from job.train.checkpoint.storage import CheckpointStore
from job.train.trackers import TrackerFiles

if TYPE_CHECKING:
    import torch

    from job.engines.stored_adapter import StoredAdapter

TRAIN = "train"
"""The folder of the label proof, length statistics and history."""


class AnswerMetrics(Protocol):
    """Generates and scores answers to validation rows; evaluation has the implementation."""

    def generate(
        self, model: "torch.nn.Module", rows: Sequence[Row], stop: Callable[[], bool]
    ) -> list[str]:
        """The answers to the rows, in their order; incomplete if `stop` became true."""

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, float]:
        """The metrics of all answers to the rows, by name."""


@dataclass(frozen=True, kw_only=True)
class TrainContext:
    spec: JobSpec
    engine: Engine
    accelerator: Accelerator
    family: Family
    start: "StoredAdapter | None"
    """The adapter that training continues from; None starts with a new one."""
    data: PreparedData
    directory: Path
    """The folder for the stage's outputs."""
    scratch: Path
    """Local folder for checkpoints before they are stored; removed at the end."""
    checkpoints: CheckpointStore
    trackers: TrackerFiles
    publish: Callable[[str], None]
    """Uploads a file of `directory` immediately, before the stage ends."""
    check_lease: Callable[[], None]
    """Raises if another job has taken over the output."""
    report_step: Callable[[telemetry.Step], None]
    """Called with every logged step."""
    report_validation: Callable[[telemetry.Validation], None]
    answer_metrics: AnswerMetrics | None
    """None if validations measure the loss only."""
    ways: Ways = field(default_factory=Ways)
    """What the trials of ways to compute found; none were tried by default."""
    folder: str = TRAIN
    """The folder of the history."""

    @property
    def train_directory(self) -> Path:
        return self.directory / self.folder
