"""The report's data other than metrics: counts, error rates, stage times, settings."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job import log
from job.artifacts.records import StageRecord
from job.evaluation.report.formatting import amount
from job.evaluation.report.headline import METRICS
from job.evaluation.report.samples import PredictionRecord, cer
from job.spec.answer_kinds import bare_metric


@dataclass(frozen=True, kw_only=True)
class Count:
    """A number of rows or answers."""

    name: str
    description: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Band:
    """The rows within a range of character error rates."""

    name: str
    after: int
    after_share: float
    before: int | None
    before_share: float


@dataclass(frozen=True, kw_only=True)
class StageTime:
    name: str
    started: str
    duration: str
    share: float
    """The stage's share of the total time, 0 to 1."""
    before: float
    """The share of all stages before it."""


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    path: str
    value: str
    changed: bool


def counts(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> tuple[Count, ...]:
    """Rows and answers, from the summaries of the baseline and eval stages."""
    metrics = after["metrics"]
    rows = int(after.get("rows", metrics.get("rows", 0)))
    answers = int(after.get("answers", rows))
    result = [Count(name="Rows evaluated", description="", value=f"{rows:,}")]
    if answers != rows:
        result.append(Count(name="Answers", description="in conversations", value=f"{answers:,}"))
    if "max_new_tokens" in after:
        cut = f"{after['cut_short']:,}"
        if before is not None and "cut_short" in before:
            cut = f"{before['cut_short']:,} → {cut}"
        description = f"answers that reached the limit of {after['max_new_tokens']:,} tokens"
        result.append(Count(name="Cut short", description=description, value=cut))
    if after.get("cannot_be_right"):
        description = "labels longer than the limit: no answer can be right"
        value = f"{after['cannot_be_right']:,}"
        result.append(Count(name="Labels too long", description=description, value=value))
    if metrics.get("labels_not_json"):
        description = "excluded from the field metrics"
        value = f"{int(metrics['labels_not_json']):,}"
        result.append(Count(name="Labels that are not JSON", description=description, value=value))
    return tuple(result)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The validations of a training: the best, the last, and what became of them."""

    name: str
    """Of the metric that chose the best step."""
    best: str
    best_step: int
    last: str
    last_step: int
    text: str


def kept_step(summary: Mapping[str, Any]) -> str:
    """The step whose weights a validated training, or reinforcement, has kept, in words."""
    kept, best = summary["validation"]["exported_step"], summary["validation"]["best_step"]
    which = "best" if kept == best else "last" if kept == summary["steps"] else "kept"
    return f"{which} step, {kept:,}"


def validation(train: Mapping[str, Any], *, reinforced: bool = False) -> Validation | None:
    """From the summary of the train stage; None if nothing was validated, or nothing finite.

    `reinforced` means that its weights are where reinforcement starts.
    """
    found = train.get("validation")
    if not found or found["best"] is None or found["last_step"] is None:
        return None
    metric = bare_metric(found["metric"])
    kind = METRICS.get(metric)
    name, unit = (kind.name, kind.unit) if kind else (metric, "")
    times, rows = int(found["validations"]), int(found["rows"])
    parts = [
        f"Validated {times:,} times on {rows:,} rows of their own, "
        f"which took {float(found['share']):.1%} of the training time."
    ]
    if found["stopped_early"]:
        parts.append(f"Training stopped early at step {int(train['steps']):,}: no improvement.")
    what = "Reinforcement starts from" if reinforced else "The results are those of"
    parts.append(f"{what} the {kept_step(train)}.")
    return Validation(
        name=name if name.isupper() else name[0].lower() + name[1:],
        best=amount(float(found["best"]), unit),
        best_step=int(found["best_step"]),
        last="not finite" if found["last"] is None else amount(float(found["last"]), unit),
        last_step=int(found["last_step"]),
        text=" ".join(parts),
    )


_BANDS = (
    ("0", 0.0),
    ("up to 0.1", 0.1),
    ("up to 0.3", 0.3),
    ("up to 0.6", 0.6),
    ("up to 1", 1.0),
    ("over 1", math.inf),
)


def bands(
    before: Sequence[PredictionRecord], after: Sequence[PredictionRecord]
) -> tuple[Band, ...]:
    """Rows by character error rate; `before` is empty without a baseline."""

    def count(predictions: Sequence[PredictionRecord], low: float, high: float) -> int:
        return sum(low < cer(each) <= high for each in predictions)

    result = []
    low = -1.0
    for name, high in _BANDS:
        now, was = count(after, low, high), count(before, low, high)
        result.append(
            Band(
                name=name,
                after=now,
                after_share=now / max(1, len(after)),
                before=was if before else None,
                before_share=was / max(1, len(before)),
            )
        )
        low = high
    return tuple(result)


def times(stages: Mapping[str, StageRecord]) -> tuple[StageTime, ...]:
    """The start and duration of each stage, in order."""
    total = sum(stage.seconds for stage in stages.values()) or 1
    result, before = [], 0.0
    for stage in stages.values():
        share = stage.seconds / total
        result.append(
            StageTime(
                name=stage.name,
                started=stage.started.replace("T", " ").removesuffix("Z"),
                duration=log.duration(stage.seconds),
                share=share,
                before=before,
            )
        )
        before += share
    return tuple(result)


def settings(
    resolved: Mapping[str, Any], changed: Sequence[str], sections: Sequence[str]
) -> tuple[SettingRow, ...]:
    """Every key of the sections with its value, in the spec's order."""
    marked = set(changed)
    return tuple(
        SettingRow(path=path, value=as_text(value), changed=path in marked)
        for section in sections
        for path, value in leaves(resolved[section], section)
    )


def leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    """The values of a resolved spec by their dotted keys; lists of mappings are numbered."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{number}]")
    else:
        yield path, value


def as_text(value: object) -> str:
    """A setting's value as the page shows it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(as_text, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
