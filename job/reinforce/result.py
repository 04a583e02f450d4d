"""The summary of the reinforce stage."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from job.reinforce.progress import read_history
from job.reinforce.prompts import RolloutOrder
from job.train.adapting import AdaptedModel
from job.train.checkpoint.resume import step_of
from job.train.train_context import TrainContext

if TYPE_CHECKING:
    from job.reinforce.reinforce import ReinforceSession


@dataclass(frozen=True, kw_only=True)
class ReinforceResult:
    steps: int
    resumed_from_step: int
    rows_a_step: int
    answers_a_step: int
    distinct_rows: int
    """Training rows that were answered at least once."""
    passed_over_rows: int
    """Rows with a prompt over `train.max_length`, among those that were looked at."""
    first_reward: float | None
    """The mean weighted reward of the first logged step."""
    last_reward: float | None
    """Of the last one."""
    rewards: dict[str, dict[str, float | None]]
    """Each reward's mean in the first and the last logged step, unweighted."""
    equal_groups: float | None
    """The share of rows whose answers all had the same reward, over all steps: they teach
    nothing."""
    learned: bool
    """Whether any row's answers differed in their reward."""
    entropy: float | None
    """Of a token's choice, in nats, in the last logged step that learned from any answer."""
    kl: float | None
    """The divergence from the adapter at the start, in the last logged step; None without beta."""
    tokens: int
    """Prompts and answers, of all sessions."""
    seconds: float
    generating_seconds: float
    """Of the rollouts of this session; the share of `seconds` is `generating_share`."""
    generating_share: float
    generated_tokens_per_second: float
    peak_memory_bytes: int
    trainable_parameters: int
    validation: dict[str, Any] | None
    """The metric, the best and the last validation, and the step whose weights are kept."""

    @property
    def reward_fell(self) -> bool:
        """Whether the weights are those of a last step whose reward is less than half of the
        first's: more than chance does."""
        first, last = self.first_reward, self.last_reward
        kept = self.steps if self.validation is None else self.validation["exported_step"]
        return kept == self.steps and first is not None and last is not None and last < first / 2

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(
    context: TrainContext,
    session: "ReinforceSession",
    adapted: AdaptedModel,
    order: RolloutOrder,
    *,
    seconds: float,
    kept: int,
) -> ReinforceResult:
    """The result, from the history and the trainer; `kept` is the step of the stored weights."""
    trainer, own = session.trainer, session.own
    steps = [each for each in read_history(context.train_directory) if "loss" in each]
    last = steps[-1] if steps else {}
    # Steps that learn from answers of an earlier one have no rewards of their own.
    rewarded = [each for each in steps if "reward" in each] or [{}]
    equal = [each["equal_groups"] for each in steps if each.get("equal_groups") is not None]
    generating = trainer.generating_seconds
    return ReinforceResult(
        steps=trainer.state.global_step,
        resumed_from_step=step_of(session.resumed_from),
        rows_a_step=own.rows_a_step,
        answers_a_step=own.answers_a_step,
        distinct_rows=len({row for group in order.groups for row in group}),
        passed_over_rows=len(trainer.prompts.passed_over),
        first_reward=rewarded[0].get("reward"),
        last_reward=rewarded[-1].get("reward"),
        rewards={
            name: {"first": value, "last": rewarded[-1]["rewards"].get(name)}
            for name, value in rewarded[0].get("rewards", {}).items()
        },
        equal_groups=round(sum(equal) / len(equal), 4) if equal else None,
        learned=any(share < 1 for share in equal),
        entropy=next((each["entropy"] for each in reversed(steps) if "entropy" in each), None),
        kl=last.get("kl"),
        tokens=trainer.state.num_input_tokens_seen,
        seconds=round(seconds, 3),
        generating_seconds=round(generating, 3),
        generating_share=round(generating / max(seconds, 1e-9), 4),
        generated_tokens_per_second=round(trainer.generated_tokens / max(generating, 1e-9), 1),
        peak_memory_bytes=context.accelerator.peak_memory_bytes(),
        trainable_parameters=adapted.trainable_parameters,
        validation=_validation(session, kept),
    )


def _validation(session: "ReinforceSession", kept: int) -> dict[str, Any] | None:
    if session.selection is None:
        return None
    history = session.trainer.state.log_history
    every, best = session.selection.validations(history), session.selection.best(history)
    last = every[-1] if every else None
    return {
        "metric": session.selection.metric,
        "greater_is_better": session.selection.greater_is_better,
        "best_step": best.step if best else None,
        "best": best.value if best else None,
        "last_step": last.step if last else None,
        "last": last.value if last and math.isfinite(last.value) else None,
        "best_metrics": dict(best.metrics) if best else {},
        "exported_step": kept,
        "stopped_early": False,
        "validations": len(every),
    }
