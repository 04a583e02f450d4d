"""The job's log, on standard error.

On a terminal, a progress bar and short coloured lines; elsewhere, one structured line per event, as
text (`12:00:01 INFO train step=3 loss=0.41`) or JSON. Secrets are replaced by their names before
anything is written.
"""

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TextIO

from job.log.units import Quantity, byte_count, duration, fraction, number, seconds, size
from job.redaction import as_json, printable, redact, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = [
    "Format",
    "Level",
    "Progress",
    "Quantity",
    "byte_count",
    "configure",
    "debug",
    "duration",
    "error",
    "fraction",
    "info",
    "is_json",
    "is_terminal",
    "metrics",
    "number",
    "on_terminal",
    "progress",
    "seconds",
    "size",
    "stage",
    "warn",
]

Format = Literal["auto", "text", "json"]
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
RANK: dict[str, int] = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40}
STYLE: dict[str, str] = {"DEBUG": "dim", "INFO": "", "WARNING": "yellow", "ERROR": "bold red"}


@dataclass
class _State:
    format: Format = "auto"
    threshold: int = RANK["INFO"]
    console: "Console | None" = None
    stage: str | None = None


_state = _State()


def configure(format: Format = "auto", level: Level = "INFO") -> None:
    """Sets the format and the threshold."""
    _state.format, _state.threshold, _state.console = format, RANK[level], None
    # Libraries log errors only, and warnings with --verbose or --debug.
    libraries = logging.StreamHandler(sys.stderr)
    libraries.setFormatter(_Libraries("%(name)s: %(message)s"))
    logging.basicConfig(
        level=logging.WARNING if level == "DEBUG" else logging.ERROR, handlers=[libraries]
    )


class _Libraries(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return _json(record.levelname, text, {}) if is_json() else shown(text)


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that understands control sequences."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def on_terminal() -> bool:
    """Whether standard error is a terminal and no format was requested."""
    return _state.format == "auto" and is_terminal(sys.stderr)


def is_json() -> bool:
    """Whether the log is JSON."""
    return _state.format == "json"


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Context in which each JSON line has the field `stage`."""
    before, _state.stage = _state.stage, name
    try:
        yield
    finally:
        _state.stage = before


def debug(event: str, **fields: object) -> None:
    _write("DEBUG", event, fields)


def info(event: str, **fields: object) -> None:
    _write("INFO", event, fields)


def warn(event: str, **fields: object) -> None:
    _write("WARNING", event, fields)


def error(event: str, **fields: object) -> None:
    _write("ERROR", event, fields)


def _write(level: Level, event: str, fields: dict[str, object]) -> None:
    if RANK[level] < _state.threshold:
        return
    if on_terminal():
        _console().print(_line(level, event, fields), soft_wrap=True)
        return
    if _state.format == "json":
        line = _json(level, event, fields)
    else:
        pairs = "".join(f" {key}={_quote(_text(value))}" for key, value in fields.items())
        line = f"{_utc('%H:%M:%S')} {level} {_one_line(event)}{pairs}"
    # A single write, so that lines of other threads do not interleave.
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _line(level: Level, event: str, fields: Mapping[str, object]) -> "Text":
    """A line for the terminal; built from parts, so that data is never parsed as markup."""
    from rich.text import Text

    line = Text().append(_one_line(event), style=STYLE[level])
    for key, value in fields.items():
        line.append("  ").append(key, style="dim").append(f" {_text(value)}")
    return line


def _one_line(text: str) -> str:
    return printable(redact(text))


def _json(level: str, event: str, fields: Mapping[str, object]) -> str:
    record = {"time": _utc("%Y-%m-%dT%H:%M:%SZ"), "level": level, "event": event}
    stage = {} if _state.stage is None else {"stage": _state.stage}
    return as_json({**record, **stage, **_numbers(fields)}, default=_text)


def metrics(changes: Mapping[str, tuple[float | None, float]]) -> None:
    """Logs each metric before and after training: a table on a terminal, else one line each."""
    if not on_terminal():
        for name, (before, after) in changes.items():
            info(f"{name}: " + ("" if before is None else f"{number(before)} → ") + number(after))
    elif changes and RANK["INFO"] >= _state.threshold:
        from rich import box
        from rich.table import Table

        table = Table("", box=box.SIMPLE_HEAD)
        for title in ("before", "after"):
            table.add_column(title, justify="right")
        for name, (before, after) in changes.items():
            table.add_row(name, "" if before is None else number(before), number(after))
        _console().print(table)


def _numbers(fields: Mapping[str, object]) -> dict[str, object]:
    """Fields as JSON values; a quantity's name ends in its unit."""
    record: dict[str, object] = {}
    for key, value in fields.items():
        numbers = value.numbers if isinstance(value, Quantity) else {"": value}
        record |= {key + suffix: each for suffix, each in numbers.items()}
    return record


def _console() -> "Console":
    if _state.console is None:
        from rich.console import Console  # takes 60 ms, so only on a terminal

        _state.console = Console(stderr=True, highlight=False)
    return _state.console


def _utc(pattern: str) -> str:
    return time.strftime(pattern, time.gmtime())


def _text(value: object) -> str:
    return number(value) if isinstance(value, float) else shown(str(value))


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if re.search(r"[\s\"=]", text) or not text else text


class Progress(Protocol):
    """Reports the progress of a long task."""

    def advance(self, done: int = 1, **fields: object) -> None:
        """Adds `done` units of work, and shows `fields`."""


@contextmanager
def progress(label: str, total: int | None, unit: str = "rows") -> Iterator[Progress]:
    """Shows progress: a bar on a terminal, a line every ten seconds elsewhere."""
    if on_terminal() and RANK["INFO"] >= _state.threshold:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        # Counts keep their width; the bar and then the values shrink.
        fixed = Column(no_wrap=True)
        flexible = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        columns = (
            TextColumn("{task.description}", table_column=fixed, markup=False),
            BarColumn(bar_width=min(40, max(8, _console().width - 72))),
            MofNCompleteColumn(table_column=fixed),
            TextColumn(f"{unit} [dim]{{task.fields[rate]}}[/]", table_column=fixed),
            TimeRemainingColumn(compact=True, table_column=fixed),
            TextColumn("{task.fields[shown]}", style="dim", table_column=flexible, markup=False),
        )
        with RichProgress(*columns, console=_console(), transient=True, expand=True) as bars:
            yield _Bar(bars, bars.add_task(_one_line(label), total=total, shown="", rate=""))
    else:
        yield _Lines(label, total, unit)


class _Bar:
    def __init__(self, bars: "object", task: int) -> None:
        self._bars, self._task = bars, task
        self._done, self._started = 0, time.monotonic()

    def advance(self, done: int = 1, **fields: object) -> None:
        shown = "  ".join(f"{key} {_one_line(_text(value))}" for key, value in fields.items())
        self._done += done
        rate = f"{number(self._done / max(time.monotonic() - self._started, 1e-9), 3)}/s"
        self._bars.update(self._task, advance=done, shown=shown, rate=rate)  # type: ignore[attr-defined]


class _Lines:
    def __init__(
        self, label: str, total: int | None, unit: str, every_seconds: float = 10.0
    ) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._every, self._done = every_seconds, 0
        self._started = self._last = time.monotonic()

    def advance(self, done: int = 1, **fields: object) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._last < self._every and self._done != self._total:
            return
        self._last = now
        rate = self._done / max(now - self._started, 1e-9)
        counts = {
            "done": fraction(self._done, self._total),
            "rate": Quantity(f"{number(rate, 3)} {self._unit}/s", {"": rate}),
        }
        if self._total is not None and self._done:
            counts["left"] = seconds(max(self._total - self._done, 0) / rate)
        info(self._label, **counts, **fields)
