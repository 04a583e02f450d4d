"""Answers to rewards: TRL's reward functions from the spec's, and a record of what they saw."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from job.reinforce.prompts import Prompts
from job.rewards.named import NamedReward
from job.rewards.reward import Scored

SAMPLES = 4
"""Rows of a rollout whose answers are stored."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An answer of a rollout, for the report."""

    step: int
    row: int
    id: str
    reference: str
    answer: str
    rewards: dict[str, float]
    reward: float
    """The weighted sum."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(kw_only=True)
class Scorer:
    """Scores the answers of rollouts by every reward of the spec."""

    prompts: Prompts
    rewards: Sequence[NamedReward]
    scored: tuple[Scored, ...] = ()
    """The answers of the last rollout, in order, and their values by reward."""
    values: dict[str, list[float]] = field(default_factory=dict)

    def functions(self) -> list[Callable[..., list[float]]]:
        """A function for each reward, as TRL calls it; its name is the reward's."""
        return [self._function(reward) for reward in self.rewards]

    @property
    def weights(self) -> list[float]:
        return [reward.weight for reward in self.rewards]

    def _function(self, reward: NamedReward) -> Callable[..., list[float]]:
        def score(*, completions: Sequence[str], row: Sequence[int], **_: object) -> list[float]:
            self.scored = tuple(map(self._scored, completions, row))
            self.values[reward.name] = reward.score(self.scored)
            return self.values[reward.name]

        score.__name__ = reward.name
        return score

    def _scored(self, answer: str, row: int) -> Scored:
        asked = self.prompts.question(row)
        return Scored(
            answer=answer.strip(),
            reference=asked.label,
            prompt="\n".join(message.text for message in asked.asked),
            row=row,
        )

    def samples(self, step: int) -> list[Sample]:
        """The answers to the first rows of the last rollout."""
        rows = list(dict.fromkeys(each.row for each in self.scored))[:SAMPLES]
        return [
            Sample(
                step=step,
                row=each.row,
                id=self.prompts.rows[each.row].id,
                reference=each.reference,
                answer=each.answer,
                rewards={name: values[number] for name, values in self.values.items()},
                reward=sum(
                    reward.weight * self.values[reward.name][number] for reward in self.rewards
                ),
            )
            for number, each in enumerate(self.scored)
            if each.row in rows
        ]
