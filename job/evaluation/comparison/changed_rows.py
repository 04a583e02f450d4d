"""The rows that a comparison's page shows: image, label, and each run's answer."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from job import storage
from job.errors import JobError
from job.evaluation.comparison.answers import AnswerChanges, ChangedAnswer, Key, by_key
from job.evaluation.comparison.stored_run import HELD_OUT, StoredRun
from job.evaluation.report.embedded_images import EmbeddedImage, ImageEmbedder
from job.evaluation.report.generated_text import MAX_CHARACTERS, Excerpt, difference, plain
from job.evaluation.report.samples import MAX_JSON_CHARACTERS, PredictionRecord, images
from job.prep.rows import Row
from job.prep.shards import Rows, order_file, shard_paths
from job.redaction import redact

MAX_DOWNLOAD = 512 * 2**20
"""Bytes of held-out rows to download for their images; a local run's are read in place."""


@dataclass(frozen=True, kw_only=True)
class RunAnswer:
    letter: str
    right: bool
    text: Excerpt


@dataclass(frozen=True, kw_only=True)
class RowCard:
    id: str
    turn: int | None
    """Number of the answer in its row; None if it is the first."""
    label: Excerpt
    answers: tuple[RunAnswer, ...]
    images: tuple[EmbeddedImage, ...]
    more_images: int


RowOf = Callable[[PredictionRecord], Row | None]
"""Finds the row of a prediction, or None."""


def cards(
    runs: Sequence[StoredRun],
    changed: Sequence[ChangedAnswer],
    reference: int,
    row_of: RowOf,
    embedder: ImageEmbedder,
) -> tuple[RowCard, ...]:
    """The cards of changed answers, in order."""
    tables = [by_key(run) for run in runs]
    return tuple(
        _card(runs, tables, each, tables[reference][each.key], row_of, embedder)
        for each in changed
    )  # fmt: skip


def spread(changes: AnswerChanges, count: int) -> tuple[list[ChangedAnswer], list[ChangedAnswer]]:
    """At most `count` lost and as many gained answers, evenly spaced."""

    def some(found: Sequence[ChangedAnswer]) -> list[ChangedAnswer]:
        number = min(count, len(found))
        return [found[at * len(found) // number] for at in range(number)]

    lost = [each for each in changes.changed if each.lost]
    gained = [each for each in changes.changed if not each.lost]
    return some(lost), some(gained)


def _card(
    runs: Sequence[StoredRun],
    tables: Sequence[Mapping[Key, PredictionRecord]],
    changed: ChangedAnswer,
    reference: PredictionRecord,
    row_of: RowOf,
    embedder: ImageEmbedder,
) -> RowCard:
    row_id, turn = changed.key
    label = str(reference.get("label", ""))
    json = any(run.kind == "json" for run in runs)
    limit = MAX_JSON_CHARACTERS if json else MAX_CHARACTERS
    row = row_of(reference)
    shown, more = ((), 0) if row is None else images(row, reference, embedder)
    answers = tuple(
        RunAnswer(
            letter=run.letter,
            right=right,
            text=difference(str(table[changed.key].get("prediction", "")), label, limit),
        )
        for run, table, right in zip(runs, tables, changed.right, strict=True)
        if right is not None
    )
    return RowCard(
        id=row_id[:120],
        turn=turn if turn > 1 else None,
        label=plain(label, limit),
        answers=answers,
        images=shown,
        more_images=more,
    )


@contextmanager
def held_out_rows(run: StoredRun) -> Iterator[tuple[RowOf, str | None]]:
    """Context with a function that finds the run's held-out rows, and why it finds none."""
    files = run.stages["prep"].files if "prep" in run.stages else ()
    shards = [each for each in files if each.path.startswith(HELD_OUT)]
    size = sum(each.size for each in shards)
    if not shards:
        yield _nothing, "the run has no prepared rows"
    elif storage.is_local(run.uri):
        yield _rows_in(storage.local_path(run.uri) / "data")
    elif size > MAX_DOWNLOAD:
        yield _nothing, f"the held-out rows take {size / 2**20:,.0f} MiB; compare local copies"
    else:
        with tempfile.TemporaryDirectory(prefix="job-compare-") as directory:
            try:
                for each in shards:
                    target = Path(directory, each.path)
                    storage.download(storage.join(run.uri, each.path), target)
            except JobError as error:
                found: tuple[RowOf, str | None] = (_nothing, error.problems[0].message)
            else:
                found = _rows_in(Path(directory, "data"))
            yield found


def _rows_in(directory: Path) -> tuple[RowOf, str | None]:
    if not shard_paths(directory, "eval"):
        return _nothing, "the held-out rows are missing"
    order = order_file(directory, "eval")
    try:
        rows = Rows(shard_paths(directory, "eval"), order if order.exists() else None)
    except Exception as error:  # noqa: BLE001 - a damaged shard costs the images alone
        return _nothing, f"the held-out rows are unreadable: {type(error).__name__}: {error}"

    def row_of(prediction: PredictionRecord) -> Row | None:
        number = int(prediction.get("row", -1))
        if not 0 <= number < len(rows):
            return None
        row = rows[number]
        return row if redact(row.id) == str(prediction["id"]) else None

    return row_of, None


def _nothing(_: PredictionRecord) -> None:
    return None
