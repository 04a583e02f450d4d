"""Answers to held-out rows that are right in one run and wrong in another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from job.evaluation.comparison.stored_run import StoredRun
from job.evaluation.report.samples import PredictionRecord, is_right, key_of
from job.storage.digests import fingerprint

Key = tuple[str, int]
"""The row's id, and the number of the answer in it."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The rows that the runs answered."""

    same: bool
    """Whether all runs with answers have the same rows, by id, number of the answer, and label."""
    answers: tuple[int | None, ...]
    """Number of answers in each run; None for a run without answers."""
    digests: tuple[str | None, ...]
    """A digest of each run's ids and labels."""
    common: tuple[Key, ...]
    """The answers that all these runs have, with the same label; in the order of the first run."""
    other_labels: int
    """Answers with equal ids whose labels differ between runs."""


@dataclass(frozen=True, kw_only=True)
class ChangedAnswer:
    """A row that is right in some runs and wrong in others."""

    key: Key
    right: tuple[bool | None, ...]
    """By run; None for a run without answers."""
    lost: bool
    """Whether the reference is right, so that the change is for the worse."""


@dataclass(frozen=True, kw_only=True)
class AnswerChanges:
    """The common rows, run by run, against the reference: the first run with answers."""

    reference: int | None
    """Its index; None if fewer than two runs can be compared."""
    reason: str | None
    """Why none can be compared."""
    right: tuple[int | None, ...]
    """Number of right answers in each run."""
    lost: tuple[tuple[Key, ...] | None, ...]
    """Right in the reference, wrong in the run."""
    gained: tuple[tuple[Key, ...] | None, ...]
    """Wrong in the reference, right in the run."""
    changed: tuple[ChangedAnswer, ...]
    """Lost by any run, then gained by any, in the order of the rows."""


def held_out(runs: Sequence[StoredRun]) -> HeldOut:
    """Compares the rows of the runs that have answers."""
    labels = [_labels(run) for run in runs]
    tables = [each for each in labels if each]
    first = tables[0] if tables else {}
    shared = [key for key in first if all(key in table for table in tables)]
    common = [key for key in shared if all(table[key] == first[key] for table in tables)]
    return HeldOut(
        same=all(table == first for table in tables),
        answers=tuple(len(each) or None for each in labels),
        digests=tuple(fingerprint(sorted(each.items()))[:12] if each else None for each in labels),
        common=tuple(common),
        other_labels=len(shared) - len(common),
    )


def changes(runs: Sequence[StoredRun], rows: HeldOut) -> AnswerChanges:
    """Which of the common rows each run answers rightly, and what differs from the reference."""
    having = [number for number, run in enumerate(runs) if run.answers]
    reason = _why_not(runs, having, rows)
    none: tuple[None, ...] = (None,) * len(runs)
    if reason is not None:
        return AnswerChanges(
            reference=None, reason=reason, right=none, lost=none, gained=none, changed=()
        )
    reference = having[0]
    right = [_right(run) if run.answers else None for run in runs]
    base = right[reference]
    assert base is not None, "the reference has answers"
    others = [n for n in having if n != reference]
    changed = [
        ChangedAnswer(
            key=key,
            right=tuple(None if table is None else table[key] for table in right),
            lost=base[key],
        )
        for key in rows.common
        if any(_at(right, n)[key] != base[key] for n in others)
    ]
    return AnswerChanges(
        reference=reference,
        reason=None,
        right=tuple(None if table is None else sum(table[key] for key in rows.common)
                    for table in right),
        lost=tuple(_against(base, right, n, rows, lost=True) if n in others else None
                   for n in range(len(runs))),
        gained=tuple(_against(base, right, n, rows, lost=False) if n in others else None
                     for n in range(len(runs))),
        changed=tuple(sorted(changed, key=lambda each: not each.lost)),
    )  # fmt: skip


def by_key(run: StoredRun) -> Mapping[Key, PredictionRecord]:
    """The run's answers by row and number."""
    return {key_of(each): each for each in run.answers}


def _against(
    base: Mapping[Key, bool],
    right: Sequence[Mapping[Key, bool] | None],
    number: int,
    rows: HeldOut,
    *,
    lost: bool,
) -> tuple[Key, ...]:
    table = _at(right, number)
    return tuple(key for key in rows.common if base[key] is lost and table[key] is not lost)


def _at(right: Sequence[Mapping[Key, bool] | None], number: int) -> Mapping[Key, bool]:
    table = right[number]
    assert table is not None, "a run that is compared has answers"
    return table


def _labels(run: StoredRun) -> dict[Key, str]:
    return {key: str(each.get("label", "")) for key, each in by_key(run).items()}


def _right(run: StoredRun) -> dict[Key, bool]:
    kind = run.kind or "text"
    return {key: is_right(each, kind) for key, each in by_key(run).items()}


def _why_not(runs: Sequence[StoredRun], having: Sequence[int], rows: HeldOut) -> str | None:
    if len(having) < 2:
        names = ", ".join(runs[n].letter for n in having) or "none"
        return f"fewer than two runs have answers ({names})"
    kinds = {runs[n].kind for n in having}
    if len(kinds) > 1:
        return f"eval.answer differs, so right means something else: {', '.join(map(str, kinds))}"
    return None if rows.common else "the runs have no held-out row in common"
