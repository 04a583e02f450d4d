"""Compares runs by their stored outputs: settings, metrics, curves, and answers that changed.

Reads only small files, and the held-out images of the rows that the page shows. Runs may be
unfinished, failed or from another version: what one lacks is named, and the rest is compared.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from job import redaction, storage
from job.errors import InputError, Problem, UsageError
from job.evaluation.comparison.answers import AnswerChanges, HeldOut, changes, held_out
from job.evaluation.comparison.differences import (
    ABSENT,
    Difference,
    Differences,
    differences,
)
from job.evaluation.comparison.measures import (
    Figure,
    MetricLine,
    common_metrics,
    figures,
    metrics,
)
from job.evaluation.comparison.stored_run import StoredRun, read_run
from job.spec.rules.locations import canonical
from job.storage.digests import fingerprint

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
RUNS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs beside each other; every tuple of values has one per run, in the order given."""

    runs: tuple[StoredRun, ...]
    differences: Differences
    metrics: tuple[MetricLine, ...]
    common_metrics: tuple[MetricLine, ...]
    """On the rows that all runs have; empty if all have the same rows."""
    figures: tuple[Figure, ...]
    held_out: HeldOut
    answers: AnswerChanges

    def to_json(self) -> dict[str, object]:
        """The comparison as JSON values: tables by key, then by run."""
        changes = self.answers
        runs = {
            run.letter: {
                "uri": run.uri, "name": run.name, "status": run.status, "stage": run.stage,
                "started": run.started, "finished": run.finished, "lacks": run.lacks,
            }
            for run in self.runs
        }  # fmt: skip
        return {
            "runs": runs,
            "settings": self._differences(self.differences.settings),
            "inputs": self._differences(self.differences.inputs),
            "metrics": self._metrics(self.metrics),
            "metrics_on_common_rows": self._metrics(self.common_metrics),
            "training": {each.key: self._by_run(each.values) for each in self.figures},
            "versions": self._differences(self.differences.versions),
            "machine": self._differences(self.differences.machines),
            "held_out": {
                "same": self.held_out.same,
                "answers": self._by_run(self.held_out.answers),
                "digests": self._by_run(self.held_out.digests),
                "common": len(self.held_out.common),
                "other_labels": self.held_out.other_labels,
            },
            "answers": {
                "reference": None
                if changes.reference is None
                else self.runs[changes.reference].letter,
                "not_compared": changes.reason,
                "right": self._by_run(changes.right),
                "lost": self._by_run(changes.lost),
                "gained": self._by_run(changes.gained),
            },
        }

    def _metrics(self, lines: Sequence[MetricLine]) -> dict[str, object]:
        return {
            line.key: {
                "baseline": self._by_run([value.before for value in line.values]),
                "final": self._by_run([value.after for value in line.values]),
                "best": [
                    run.letter
                    for run, value in zip(self.runs, line.values, strict=True)
                    if value.best
                ],
            }
            for line in lines
        }

    def _differences(self, found: Sequence[Difference]) -> dict[str, object]:
        return {each.key: self._by_run(each.values) for each in found}

    def _by_run(self, values: Sequence[object]) -> dict[str, object]:
        """Null for a run without a value; a run without the key has no entry."""
        return {
            run.letter: value
            for run, value in zip(self.runs, values, strict=True)
            if value is not ABSENT
        }


def compare(uris: Sequence[str]) -> Comparison:
    """Compares the runs at `uris`; the first with answers is the reference.

    Raises UsageError for fewer than two runs, more than 26, or one named twice, and InputError
    naming every URI that is no run or cannot be read.
    """
    _check(uris)
    runs = _read(uris)
    rows = held_out(runs)
    return Comparison(
        runs=runs,
        differences=differences(runs),
        metrics=metrics(runs, comparable=rows.same),
        common_metrics=() if rows.same or not rows.common else common_metrics(runs, rows),
        figures=figures(runs),
        held_out=rows,
        answers=changes(runs, rows),
    )


def as_json(comparison: Comparison) -> str:
    """The comparison as JSON, without secrets."""
    return redaction.as_json(comparison.to_json(), indent=2)


def _check(uris: Sequence[str]) -> None:
    for uri in uris:
        redaction.add_secrets_of(uri)
    if len(uris) < 2:
        raise UsageError(
            "RUN", "needs at least two runs to compare", value=" ".join(uris),
            fix="name their outputs: python -m job compare outputs/a outputs/b",
        )  # fmt: skip
    if len(uris) > len(LETTERS):
        raise UsageError("RUN", f"takes at most {len(LETTERS)} runs", value=len(uris))
    seen: dict[str, str] = {}
    for uri in uris:
        place = fingerprint(storage.identity(canonical(uri)))
        if place in seen:
            also = "" if seen[place] == uri else f", also as {seen[place]}"
            raise UsageError("RUN", f"is named twice{also}", value=uri, fix="name each run once")
        seen[place] = uri


def _read(uris: Sequence[str]) -> tuple[StoredRun, ...]:
    """All runs at once; reports every one that cannot be read."""

    def read(uri: str, letter: str) -> StoredRun | InputError:
        try:
            return read_run(uri, letter)
        except InputError as error:
            return error

    with ThreadPoolExecutor(RUNS_AT_ONCE, "compare") as pool:
        found = list(pool.map(read, uris, LETTERS[: len(uris)]))
    problems: list[Problem] = []
    for each in found:
        problems += each.problems if isinstance(each, InputError) else ()
    if problems:
        raise InputError.from_problems(problems)
    return tuple(each for each in found if isinstance(each, StoredRun))
