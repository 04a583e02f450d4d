"""The report's section on reinforcement: curves, and answers of the first and the last step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.evaluation.report.charts import points, validation_curve
from job.evaluation.report.facts import kept_step
from job.evaluation.report.figure import RUN_COLORS, Chart, Curve, draw
from job.evaluation.report.generated_text import plain
from job.evaluation.report.headline import METRICS
from job.spec.answer_kinds import bare_metric

_ANSWERS = 8  # shown of a step


@dataclass(frozen=True, kw_only=True)
class Reinforcement:
    """What the section shows."""

    summary: Mapping[str, Any]
    """The stage's summary in `run.json`."""
    kept: str | None
    """The step whose weights were kept, in words; None without validation."""
    charts: tuple[Chart, ...]
    steps: tuple[tuple[int, tuple[Mapping[str, Any], ...]], ...]
    """The first and the last step with samples of their answers: `id`, `reward`, and `reference`
    and `answer` as the page shows text."""


def reinforcement(
    summary: Mapping[str, Any] | None,
    history: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
) -> Reinforcement | None:
    """The section; None without the stage."""
    if summary is None:
        return None
    known = sorted({each["step"] for each in samples})
    shown = tuple(dict.fromkeys([*known[:1], *known[-1:]]))
    return Reinforcement(
        summary=summary,
        kept=kept_step(summary) if summary.get("validation") else None,
        charts=reward_charts(history, summary.get("validation")),
        steps=tuple(
            (step, tuple(_shown(e) for e in [e for e in samples if e["step"] == step][:_ANSWERS]))
            for step in shown
        ),
    )


def _shown(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    texts = {name: plain(sample[name]) for name in ("reference", "answer")}
    return {"id": sample["id"], "reward": sample["reward"], **texts}


def reward_charts(
    history: Sequence[Mapping[str, Any]], validation: Mapping[str, Any] | None
) -> tuple[Chart, ...]:
    """The charts for which `reinforced/history.jsonl` has values."""
    names = list(dict.fromkeys(name for each in history for name in each.get("rewards", {})))
    by_name = [
        Curve(
            name=name,
            points=points([{"step": e["step"], **e.get("rewards", {})} for e in history], name),
            color=RUN_COLORS[number % len(RUN_COLORS)],
            trend=True,
        )
        for number, name in enumerate(names)
    ]
    reward = Curve(name="reward", points=points(history, "reward"), trend=True)
    drawn = [
        draw("Reward, weighted", [reward]),
        draw("Rewards by name", by_name, named=True),
        _from_zero(history, "Rows that teach nothing", "share", "equal_groups"),
        _from_zero(history, "Entropy of a token (nats)", "entropy", "entropy"),
        _from_zero(history, "Divergence from the start (KL)", "kl", "kl"),
        _from_zero(history, "Tokens of an answer", "tokens", "answer_tokens"),
    ]
    if validation is not None and (metric := bare_metric(validation["metric"])) in METRICS:
        title = f"{METRICS[metric].name}, validation"
        drawn.insert(1, draw(title, [validation_curve(history, metric, name="validation")]))
    return tuple(chart for chart in drawn if chart is not None)


def _from_zero(
    history: Sequence[Mapping[str, Any]], title: str, name: str, key: str
) -> Chart | None:
    return draw(title, [Curve(name=name, points=points(history, key), trend=True)], from_zero=True)
