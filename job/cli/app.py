"""The command line app. Each command's help describes it; `docs/` has the details."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from job import __version__, log, redaction, signals
from job.cli import completion, help, termination
from job.cli.commands import after_run, before_run, run
from job.cli.commands.compare import compare
from job.cli.commands.infer import infer
from job.cli.commands.init import init
from job.cli.commands.manifest import manifest
from job.cli.commands.parity import parity
from job.distributed.cores import configure_threads
from job.errors import OK, ReportedError, UsageError, reported

SCRIPT = "finetune-job"
"""The console script, as pyproject.toml names it."""

app = typer.Typer(
    name="job",
    cls=help.Commands,
    help="Fine-tune a vision-language model from a YAML spec: prep, train, eval, export.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "init": init,
    "validate": before_run.validate,
    "plan": before_run.plan,
    "doctor": before_run.doctor,
    "reference": before_run.reference,
    "schema": before_run.schema,
    "run": run.run,
    "prep": run.prep,
    "train": run.train,
    "eval": run.evaluate,
    "export": run.export,
    "infer": infer,
    "compare": compare,
    "fetch": after_run.fetch,
    "verify": after_run.verify,
    "clean": after_run.clean,
    "ask": after_run.ask,
    "manifest": manifest,
    "parity": parity,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


def _print_version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show warnings and errors only.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Also show inputs, fingerprints and stored files."),
    ] = False,
    debug: Annotated[
        bool, typer.Option(termination.DEBUG, help="Like --verbose, with tracebacks of errors.")
    ] = False,
    log_format: Annotated[
        str,
        typer.Option(
            help="auto (progress bars on a terminal, else text), text or json.",
            metavar="FORMAT",
            autocompletion=completion.one_of("auto", "text", "json"),
        ),
    ] = "auto",
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    if log_format not in ("auto", "text", "json"):
        raise UsageError("--log-format", "must be auto, text or json", value=log_format)
    level: log.Level = "WARNING" if quiet else "DEBUG" if verbose or debug else "INFO"
    log.configure(log_format, level)  # type: ignore[arg-type]


def main() -> NoReturn:
    """Runs the command line, reports errors, and exits with the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - open until the end
    # Child processes must not import modules from the current folder either.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    configure_threads(os.environ)  # before anything imports torch or numpy
    redaction.install()
    signals.install(termination.report)
    # Completion works for the console script only: a shell cannot complete `python -m job`.
    completes = {"--install-completion", "--show-completion"} & {*sys.argv}
    try:
        code = app(standalone_mode=False, prog_name=SCRIPT if completes else None) or OK
    except typer.TyperException as error:
        code = termination.report_usage(error)
    except (ReportedError, Exception) as error:  # noqa: BLE001 - tracebacks only with --debug
        signals.mark_work_ended()
        code = termination.report(reported(signals.cause_of(error)))
    termination.exit_with(code)
