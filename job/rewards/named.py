"""The rewards that a spec names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from job.rewards import any_answer, formulas, json_answers, own_code
from job.rewards.rendered import RenderMatchReward
from job.rewards.reward import Reward, each
from job.spec.types import RewardSpec

BY_NAME: Mapping[str, Reward] = {
    "exact_match": each(any_answer.exact_match),
    "character_accuracy": each(any_answer.character_accuracy),
    "render_match": RenderMatchReward(),
    "valid_latex": each(formulas.valid_latex),
    "valid_json": each(json_answers.valid_json),
    "field_f1": each(json_answers.field_f1),
    "label_accuracy": each(any_answer.label_accuracy),
    "length": each(any_answer.length),
}
"""The rewards of `job.spec.answer_kinds.REWARDS`. Their processes and caches are shared."""


@dataclass(frozen=True, kw_only=True)
class NamedReward:
    """A reward of the spec."""

    name: str
    weight: float
    score: Reward
    """Values from 0 to 1, before they are weighted."""
    digest: str | None = None
    """The SHA-256 of the file with a user's own function; None for a reward of the project's."""


def rewards_of(specs: Sequence[RewardSpec], *, allow_code: bool) -> tuple[NamedReward, ...]:
    """The rewards in the spec's order; imports a user's own.

    Raises SpecError or InputError if a function of the user's cannot be used.
    """
    found = []
    for number, spec in enumerate(specs):
        if ":" not in spec.name:
            found.append(NamedReward(name=spec.name, weight=spec.weight, score=BY_NAME[spec.name]))
            continue
        assert allow_code, "the rules of the spec refuse code unless it is allowed"
        score = own_code.load(spec.name, f"$.reinforce.rewards[{number}].name")
        found.append(
            NamedReward(
                name=spec.name, weight=spec.weight, score=score, digest=own_code.digest(spec.name)
            )
        )
    return tuple(found)
