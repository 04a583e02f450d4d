"""The learning rates of a training, and whether one of another length began with the same."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning rate schedule, by the spec's names."""

    lr_scheduler_type: str
    warmup_steps: int
    learning_rate: float
    steps: int
    """Of the whole training."""

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
        """Why the first `until` steps of a training of `steps` steps differ from this one's.

        None if their learning rates are equal.
        """
        if steps == self.steps or replace(self, steps=steps).rates(until) == self.rates(until):
            return None
        return (
            f"train.lr_scheduler_type {self.lr_scheduler_type} depends on the number of steps, "
            f"which was {steps} and is {self.steps} (train.max_steps, train.num_train_epochs)"
        )
