"""The rows that are answered: their prompts, their references, and the order of both."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from job import log
from job.errors import DataError
from job.evaluation.prompts import Question, questions
from job.families.base import Family
from job.families.encoded import Encoded
from job.prep.rows import Row
from job.spec.types import ReinforceSpec

CACHED = 256
"""Tokenized prompts that are kept: those of a step, several times over."""


@dataclass(kw_only=True)
class Prompts:
    """The last question of every training row, tokenized when it is asked for."""

    family: Family
    rows: Sequence[Row]
    max_length: int
    """Prompts with more tokens are passed over."""
    passed_over: set[int] = field(default_factory=set)
    _cached: dict[int, Encoded] = field(default_factory=dict)

    def question(self, row: int) -> Question:
        [question] = questions([self.rows[row]], "last")
        return question

    def encoded(self, row: int) -> Encoded:
        """The prompt's tokens. Raises DataError if the row contains control tokens."""
        if row not in self._cached:
            if len(self._cached) >= CACHED:
                self._cached.pop(next(iter(self._cached)))
            asked = self.question(row)
            self._cached[row] = self.family.encode_prompt(asked.id, asked.asked, asked.images)
        return self._cached[row]

    def fits(self, row: int) -> bool:
        if len(self.encoded(row).input_ids) <= self.max_length:
            return True
        if row not in self.passed_over:
            self.passed_over.add(row)
            log.debug("a prompt is longer than train.max_length", row=self.rows[row].id)
        return False


@dataclass(frozen=True, kw_only=True)
class RolloutOrder:
    """The rows of every pass: a batch sampler for the whole stage, as one epoch.

    TRL asks for the answers of a whole generation batch at the first pass that uses them, so each
    pass of it lists the same rows: every row `num_generations` times in a row.
    """

    spec: ReinforceSpec
    groups: tuple[tuple[int, ...], ...]
    """The rows of each rollout."""

    @classmethod
    def of(cls, spec: ReinforceSpec, prompts: Prompts, seed: int) -> "RolloutOrder":
        """Shuffled anew for every time through the rows. Raises DataError if no prompt fits."""
        endless = _shuffled(prompts, seed)
        return cls(
            spec=spec,
            groups=tuple(
                tuple(next(endless) for _ in range(spec.rows_a_step)) for _ in range(spec.rollouts)
            ),
        )

    def __len__(self) -> int:
        return self.spec.max_steps * self.spec.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.spec.max_steps):
            rows = self.groups[step // self.spec.num_iterations]
            batch = [row for row in rows for _ in range(self.spec.num_generations)]
            for _ in range(self.spec.gradient_accumulation_steps):
                yield list(batch)


def _shuffled(prompts: Prompts, seed: int) -> Iterator[int]:
    """Row numbers without end, in another order each time; the same for the same seed."""
    epoch = 0
    while True:
        order = list(range(len(prompts.rows)))
        random.Random(f"{seed} {epoch}").shuffle(order)  # noqa: S311 - no secret
        fitting = False
        for row in order:
            if prompts.fits(row):
                fitting = True
                yield row
        if not fitting:
            raise DataError(
                "$.data.train",
                f"no row has a prompt of at most train.max_length = {prompts.max_length} tokens",
                fix="raise train.max_length, or lower data.max_pixels",
            )
        epoch += 1
