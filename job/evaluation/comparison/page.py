"""A comparison on one self-contained HTML page, like the report."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from job import storage
from job.artifacts.nesting import run_containing
from job.errors import InputError
from job.evaluation.comparison import Comparison
from job.evaluation.comparison.changed_rows import RowCard, RowOf, cards, held_out_rows, spread
from job.evaluation.comparison.curves import curves
from job.evaluation.comparison.differences import ABSENT, Difference
from job.evaluation.comparison.measures import MetricLine
from job.evaluation.comparison.text import different_rows
from job.evaluation.report import MAX_BYTES
from job.evaluation.report.embedded_images import ImageEmbedder
from job.evaluation.report.environment import environment
from job.evaluation.report.facts import as_text
from job.evaluation.report.figure import RUN_COLORS

GENERATOR = '<meta name="generator" content="finetune-job compare">'
"""In every page, so that a page may replace an earlier one and nothing else."""

_HERE = Path(__file__).parent
_CARDS = 12  # for each direction of change
_IMAGE_BYTES = 1_000_000
_HEAD_BYTES = 4_096


@dataclass(frozen=True, kw_only=True)
class _MetricCell:
    after: str
    before: str
    change: str
    verdict: str
    against: str
    against_verdict: str
    best: bool


@dataclass(frozen=True, kw_only=True)
class _Values:
    """A line of a table: a name with a value for each run."""

    name: str
    cells: tuple[str, ...]


def write(comparison: Comparison, path: str) -> None:
    """Writes the page to `path`, a path or URI; it appears complete, or not at all.

    Raises InputError if there is a file that is no such page, or `path` is in a run's folders.
    """
    check_target(path)
    storage.write_text(path, render(comparison))


def check_target(path: str) -> None:
    """Raises InputError if the page must not be written to `path`."""
    if storage.is_file(path):
        with storage.open_read(path) as file:
            head = file.read(_HEAD_BYTES).decode("utf-8", "replace")
        if GENERATOR not in head:
            raise InputError(
                "--html", "is a file that compare did not write", value=path,
                fix="name another file, or move that one away",
            )  # fmt: skip
    folder = storage.parent(path)
    run = run_containing(folder) if folder != path else None
    if run is not None and storage.identity(run) != storage.identity(folder):
        raise InputError(
            "--html", f"is inside the output of a run, {run}", value=path,
            fix="name a file outside of it",
        )  # fmt: skip


def render(comparison: Comparison) -> str:
    """The page as HTML, with as many changed rows as fit into `MAX_BYTES`."""
    reference = comparison.answers.reference
    with ExitStack() as stack:
        row_of, no_images = None, None
        if reference is not None and comparison.answers.changed:
            run = comparison.runs[reference]
            row_of, no_images = stack.enter_context(held_out_rows(run))
        count, image_bytes = _CARDS, _IMAGE_BYTES
        while True:
            page = _page(comparison, row_of, no_images, count, image_bytes)
            if len(page.encode()) <= MAX_BYTES or not (count or image_bytes):
                return page
            count, image_bytes = count // 2, image_bytes // 2


def _page(
    comparison: Comparison, row_of: RowOf | None, no_images: str | None, count: int, budget: int
) -> str:
    changes = comparison.answers
    embedder = ImageEmbedder(budget=budget)
    lost: tuple[RowCard, ...] = ()
    gained: tuple[RowCard, ...] = ()
    if changes.reference is not None and row_of is not None:
        lost, gained = (
            cards(comparison.runs, some, changes.reference, row_of, embedder)
            for some in spread(changes, count)
        )
    first = 0 if changes.reference is None else changes.reference
    made = environment(_HERE, styles=(_HERE / "compare.css",))
    found = comparison.differences
    return made.get_template("compare.html.jinja").render(
        comparison=comparison,
        colors=[RUN_COLORS[number % len(RUN_COLORS)] for number in range(len(comparison.runs))],
        reference=comparison.runs[first].letter,
        reference_index=first,
        settings=_values(found.settings),
        inputs=_values(found.inputs),
        versions=_values([*found.versions, *found.machines]),
        metrics=[(line, _cells(line, first)) for line in comparison.metrics],
        common_metrics=[(line, _cells(line, first)) for line in comparison.common_metrics],
        different_rows=None if comparison.held_out.same else different_rows(comparison),
        figures=[_Values(name=each.name, cells=each.texts) for each in comparison.figures],
        charts=curves(comparison.runs),
        lost=lost,
        gained=gained,
        total_lost=sum(each.lost for each in changes.changed),
        total_gained=sum(not each.lost for each in changes.changed),
        no_images=no_images,
        images_omitted=embedder.omitted,
        ended=[_ended(run.finished or run.started) for run in comparison.runs],
    )


def _values(found: Sequence[Difference]) -> list[_Values]:
    return [
        _Values(
            name=each.key,
            cells=tuple("–" if value is ABSENT else as_text(value) for value in each.values),
        )
        for each in found
    ]


def _cells(line: MetricLine, reference: int) -> list[_MetricCell]:
    cells = []
    for number, value in enumerate(line.values):
        change, verdict = value.change(line.kind) or ("", "")
        against, against_verdict = "", ""
        if number != reference:
            against, against_verdict = value.against(line.values[reference], line.kind) or ("", "")
        cells.append(
            _MetricCell(
                after=value.text(line.kind),
                before=value.before_text(line.kind),
                change=change,
                verdict=verdict,
                against=against,
                against_verdict=against_verdict,
                best=value.best,
            )
        )
    return cells


def _ended(time: str) -> str:
    return time.replace("T", " ").removesuffix("Z")
