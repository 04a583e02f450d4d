"""Which validation is the best, and whether training should stop.

Both follow from the trainer's log, which checkpoints hold: a resumed training needs nothing else
to choose as an undisturbed one. Comparisons are those of Transformers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from job.spec.answer_kinds import LOWER_IS_BETTER
from job.spec.types import TrainSpec

Log = Sequence[Mapping[str, Any]]
"""`TrainerState.log_history`."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A validation's value of the metric, after a step."""

    step: int
    value: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All metrics of the validation, with the prefix `eval_`."""


@dataclass(kw_only=True)
class Selection:
    """Compares the validations of a training by `metric`.

    `since` and `unavailable` are set once, when it is known what the training resumes from.
    """

    metric: str
    """With the prefix `eval_`."""
    greater_is_better: bool
    patience: int | None
    threshold: float
    since: int = 0
    """Validations up to this step do not count: they are another training's."""
    unavailable: frozenset[int] = frozenset()
    """Validated steps that cannot be the best, because their checkpoint is not stored."""

    @classmethod
    def of(cls, train: TrainSpec) -> "Selection":
        return cls(
            metric=f"eval_{train.best_metric}",
            greater_is_better=train.best_metric not in LOWER_IS_BETTER,
            patience=train.early_stopping_patience,
            threshold=train.early_stopping_threshold,
        )

    def validations(self, log: Log) -> list[Measured]:
        """Every validation that counts, oldest first."""
        return [
            Measured(
                step=entry["step"],
                value=float(entry[self.metric]),
                metrics={k: v for k, v in entry.items() if k.startswith("eval_")},
            )
            for entry in log
            if self.metric in entry and entry["step"] > self.since
        ]

    def best(self, log: Log) -> Measured | None:
        """The best validation, of equal ones the first; None if no value is finite."""
        best: Measured | None = None
        for each in self.validations(log):
            if each.step not in self.unavailable and self._improves(each.value, best):
                best = each
        return best

    def errors(self, log: Log) -> dict[int, float]:
        """The metric by step, as a number of which lower is better; finite values only."""
        sign = -1.0 if self.greater_is_better else 1.0
        return {
            each.step: sign * each.value
            for each in self.validations(log)
            if math.isfinite(each.value)
        }

    def without_improvement(self, log: Log) -> int:
        """The number of validations since the last improvement by more than the threshold."""
        best: Measured | None = None
        count = 0
        for each in self.validations(log):
            improves = self._improves(each.value, best)
            by_enough = best is None or abs(each.value - best.value) > self.threshold
            count = 0 if improves and by_enough else count + 1
            best = each if improves else best
        return count

    def stops(self, log: Log) -> bool:
        """Whether training ends early after the last validation in the log."""
        return self.patience is not None and self.without_improvement(log) >= self.patience

    def _improves(self, value: float, best: Measured | None) -> bool:
        if not math.isfinite(value):
            return False
        if best is None:
            return True
        return value > best.value if self.greater_is_better else value < best.value
