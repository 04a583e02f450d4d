"""A comparison as a table of text, one column a run."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from job import redaction
from job.evaluation.comparison import Comparison
from job.evaluation.comparison.differences import ABSENT, Difference
from job.evaluation.comparison.measures import MetricLine
from job.evaluation.report.facts import as_text

_NAMES, _CELL, _GAP = (16, 30), (9, 16), 2
"""The narrowest and widest columns, and the space between them; longer cells are wrapped."""
_WIDE = 100
"""From this width on, names may take a third more."""
BEST = "*"
POINTS = "\u202fpp"


@dataclass(frozen=True, kw_only=True)
class _Line:
    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Section:
    title: str
    lines: tuple[_Line, ...]
    notes: tuple[str, ...] = ()


def text(comparison: Comparison, columns: int = 100) -> str:
    """The comparison, within `columns`; runs that do not fit beside the first go below."""
    sections = [section for section in _sections(comparison) if section.lines or section.notes]
    lines = [*_heads(comparison, columns)]
    lines += _tables(comparison, sections, columns)
    return redaction.shown("\n".join(lines).rstrip())


def _heads(comparison: Comparison, columns: int) -> Iterator[str]:
    """Each run's letter, place and state, and what it lacks."""
    for run in comparison.runs:
        yield f"{run.letter}  {run.uri}"
        ended = (run.finished or run.started).replace("T", " ").removesuffix("Z")
        state = run.status if run.finished else f"{run.status} since"
        where = f" in {run.stage}" if run.status in ("failed", "preempted") and run.stage else ""
        yield f"   {run.name}: {state}{where} {ended} UTC"
        for each in run.lacks:
            yield from textwrap.wrap(
                f"lacks {each}", columns, initial_indent="   ", subsequent_indent="     "
            )


def _sections(comparison: Comparison) -> Iterator[_Section]:
    found, rows = comparison.differences, comparison.held_out
    notes = []
    if found.newer_keys:
        notes.append(f"{found.newer_keys} keys that not all of the versions have are at their "
                     "defaults, and not shown.")  # fmt: skip
    if not found.settings:
        notes.append("No setting differs.")
    yield _Section(
        title="Settings that differ", lines=tuple(map(_of_difference, found.settings)),
        notes=tuple(notes),
    )  # fmt: skip
    yield _Section(title="Inputs that differ", lines=tuple(map(_of_difference, found.inputs)))
    answers = max((count or 0 for count in rows.answers), default=0)
    same = f"Metrics, {answers:,} answers" if rows.same and answers else "Metrics"
    yield _Section(
        title=same, lines=tuple(_of_metrics(comparison.metrics)),
        notes=_notes_of_metrics(comparison),
    )  # fmt: skip
    if comparison.common_metrics:
        title = f"Metrics, {len(rows.common):,} common answers"
        yield _Section(title=title, lines=tuple(_of_metrics(comparison.common_metrics)))
    yield _Section(title="Answers that changed", lines=_of_answers(comparison),
                   notes=_note_of_answers(comparison))  # fmt: skip
    figures = tuple(_Line(name=each.name, cells=each.texts) for each in comparison.figures)
    yield _Section(title="Training and data", lines=figures)
    others = (*found.versions, *found.machines)
    yield _Section(title="Versions that differ", lines=tuple(map(_of_difference, others)))


def _notes_of_metrics(comparison: Comparison) -> tuple[str, ...]:
    if not comparison.held_out.same:
        return (different_rows(comparison),)
    best = any(value.best for line in comparison.metrics for value in line.values)
    return (f"{BEST} the best after training; in brackets, the change by it",) if best else ()


def different_rows(comparison: Comparison) -> str:
    """Tells that the runs were evaluated on different rows."""
    rows = comparison.held_out
    each = ", ".join(
        f"{run.letter} has {count:,} answers ({digest})"
        for run, count, digest in zip(comparison.runs, rows.answers, rows.digests, strict=True)
        if count
    )
    more = f"; {rows.other_labels:,} more have other labels" if rows.other_labels else ""
    return (
        f"The held-out rows differ, so no metric is marked best: {each}; "
        f"{len(rows.common):,} in common{more}."
    )


def _of_difference(found: Difference) -> _Line:
    cells = ("–" if each is ABSENT else as_text(each) for each in found.values)
    return _Line(name=found.key, cells=tuple(cells))


def _of_metrics(lines: Sequence[MetricLine]) -> Iterator[_Line]:
    for line in lines:
        kind = line.kind
        after = []
        for value in line.values:
            change = value.change(kind)
            by = f" ({change[0].removesuffix(POINTS)})" if change else ""
            after.append(f"{value.text(kind)}{by}{f' {BEST}' if value.best else ''}")
        yield _Line(name=kind.name, cells=tuple(after))
        if any(value.before is not None for value in line.values):
            before = tuple(value.before_text(kind) for value in line.values)
            yield _Line(name="  before training", cells=before)


def _of_answers(comparison: Comparison) -> tuple[_Line, ...]:
    changes = comparison.answers
    if changes.reference is None:
        return ()
    first = comparison.runs[changes.reference].letter

    def counts(values: Sequence[Sequence[object] | None]) -> tuple[str, ...]:
        return tuple("–" if each is None else f"{len(each):,}" for each in values)

    right = tuple("–" if each is None else f"{each:,}" for each in changes.right)
    return (
        _Line(name="Right", cells=right),
        _Line(name=f"Right in {first}, wrong here", cells=counts(changes.lost)),
        _Line(name=f"Wrong in {first}, right here", cells=counts(changes.gained)),
    )


def _note_of_answers(comparison: Comparison) -> tuple[str, ...]:
    reason = comparison.answers.reason
    return (f"Not compared: {reason}.",) if reason else ()


def _tables(comparison: Comparison, sections: Sequence[_Section], columns: int) -> Iterator[str]:
    """All sections for as many runs as fit beside the first, then for the next ones."""
    lines = [line for section in sections for line in section.lines]
    titles = [section.title for section in sections if section.lines]
    names = max([*map(len, titles), *(len(line.name) + 2 for line in lines)], default=0)
    names = min(max(names, _NAMES[0]), _NAMES[1] * (4 if columns >= _WIDE else 3) // 3)
    lengths = [len(cell) for line in lines for cell in line.cells]
    count, room = len(comparison.runs), columns - names
    usual = max((length for length in lengths if length <= _CELL[1]), default=0)
    at_once = min(count, max(2, room // (max(usual, _CELL[0]) + _GAP)))
    cell = max(_CELL[0], min(max(lengths, default=0), room // at_once - _GAP))
    rest = list(range(1, count))
    blocks = [[0, *rest[at:][: at_once - 1]] for at in range(0, count - 1, at_once - 1)]
    for number, block in enumerate(blocks):
        for section in sections:
            if section.lines:
                heads = tuple(comparison.runs[run].letter for run in block)
                yield ""
                yield from _row(section.title, heads, names, cell)
                for line in section.lines:
                    cells = tuple(line.cells[run] for run in block)
                    yield from _row(f"  {line.name}", cells, names, cell)
            for note in section.notes if number == 0 else ():
                yield ""
                yield from textwrap.wrap(note, columns - 2, initial_indent="  ",
                                         subsequent_indent="  ")  # fmt: skip


def _row(name: str, cells: Sequence[str], names: int, width: int) -> Iterator[str]:
    """The row, with long names and cells wrapped in their columns."""
    indent = name[: len(name) - len(name.lstrip())]
    columns = [
        textwrap.wrap(name.strip(), names, initial_indent=indent, subsequent_indent=f"{indent}  "),
        *(textwrap.wrap(each, width) or [""] for each in cells),
    ]
    for number in range(max(map(len, columns))):
        pieces = [column[number] if number < len(column) else "" for column in columns]
        first, *others = pieces
        line = f"{first:<{names}}" + "".join(f"{' ' * _GAP}{each:<{width}}" for each in others)
        yield line.rstrip()
