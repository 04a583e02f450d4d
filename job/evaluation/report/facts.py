"""The report's data other than metrics: counts, error rates, stage times, settings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job import log
from job.artifacts.records import StageRecord
from job.evaluation.report.samples import PredictionRecord, cer


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
    result: list[SettingRow] = []

    def walk(value: object, path: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for number, inner in enumerate(value):
                walk(inner, f"{path}[{number}]")
        else:
            result.append(SettingRow(path=path, value=_as_text(value), changed=path in marked))

    for section in sections:
        walk(resolved[section], section)
    return tuple(result)


def _as_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
