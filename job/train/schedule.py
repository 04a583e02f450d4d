"""Learning rate schedules, and whether two of different lengths begin with the same rates."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

LENGTH_KEYS: Mapping[str, tuple[str, ...]] = {
    "train": ("max_steps", "num_train_epochs"),
    "reinforce": ("max_steps",),
}
"""The keys that set the number of steps, by section of the spec."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning rate schedule, by the spec's names."""

    lr_scheduler_type: str
    warmup_steps: int
    learning_rate: float
    steps: int
    """Number of steps of the whole training."""
    section: str = "train"
    """The part of the spec with these settings."""

    def rates(self, count: int) -> list[float]:
        """The learning rates of the first `count` steps, relative to the peak."""
        import torch
        from transformers import get_scheduler

        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        schedule = get_scheduler(
            self.lr_scheduler_type,
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=self.steps,
        )
        [factor] = schedule.lr_lambdas
        return [float(factor(step)) for step in range(count)]

    def conflict(self, steps: int, until: int) -> str | None:
        """Why a training of `steps` steps has other learning rates in its first `until` steps.

        None if they are equal.
        """
        if steps == self.steps or replace(self, steps=steps).rates(until) == self.rates(until):
            return None
        section = self.section
        lengths = ", ".join(f"{section}.{key}" for key in LENGTH_KEYS[section])
        return (
            f"{section}.lr_scheduler_type {self.lr_scheduler_type} depends on the number of steps, "
            f"which was {steps} and is {self.steps} ({lengths})"
        )
