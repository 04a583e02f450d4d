"""The options of `job compare`; `job.evaluation.comparison` implements it."""

import shutil
import sys
from typing import Annotated

import typer

from job import log, redaction
from job.cli import completion
from job.errors import UsageError

PAGE = "comparison.html"
PIPE_COLUMNS = 100
"""The width of the table where the output is no terminal."""

Runs = Annotated[list[str], typer.Argument(help="The outputs of two or more runs.", metavar="RUN")]
Html = Annotated[
    str | None,
    typer.Option(help=f"Where the page goes, a path or URI; default: {PAGE}.", metavar="FILE"),
]
NoHtml = Annotated[bool, typer.Option("--no-html", help="Write no page.")]
Format = Annotated[
    str, typer.Option(help="text or json.", autocompletion=completion.one_of("text", "json"))
]


def compare(
    runs: Runs, html: Html = None, no_html: NoHtml = False, format: Format = "text"
) -> None:
    """Compare runs: settings that differ, metrics, curves, answers that changed.

    Prints a table and writes a page with the curves and the rows that are right in one run and
    wrong in another. Runs may be unfinished: what one lacks is named. Exits with 12 if one of them
    is no run or cannot be read.
    """
    if format not in ("text", "json"):
        raise UsageError("--format", "must be text or json", value=format)
    if html is not None and no_html:
        raise UsageError("--html", "cannot be combined with --no-html", value=html)
    target = html or PAGE
    from job.evaluation import comparison
    from job.evaluation.comparison import page, text

    found = comparison.compare(runs)
    if not no_html:
        page.check_target(target)
    if format == "json":
        print(comparison.as_json(found))
    else:
        terminal = log.is_terminal(sys.stdout)
        columns = shutil.get_terminal_size().columns if terminal else PIPE_COLUMNS
        print(text.text(found, columns), flush=True)
    if not no_html:
        page.write(found, target)
        log.info("comparison page written", file=redaction.shown(target))
