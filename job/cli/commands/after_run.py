"""Commands for after a run: fetch, verify, clean, ask.

infer, compare and manifest have their own files. The docstrings are the commands' help.
"""

from pathlib import Path
from typing import Annotated

import typer

from job import log, redaction
from job.cli import completion
from job.cli.parameters import SPEC, Overrides, load
from job.errors import UsageError

FinishedRun = Annotated[str, typer.Argument(help="The output of a finished run.", metavar="URI")]


def fetch(
    uri: FinishedRun,
    to: Annotated[Path, typer.Option(help="The folder to download into.")],
    part: Annotated[
        str,
        typer.Option(
            help="adapter (the reinforced one, if there is one), merged, or another folder of the "
            "output.",
            autocompletion=completion.one_of("adapter", "adapter-vllm", "merged"),
        ),
    ] = "merged",
) -> None:
    """Download a part of a finished run and check its digests."""
    from job.cli.fetch import fetch

    log.info(f"{part} is complete", files=fetch(uri, part, to), folder=to)


def verify(output: FinishedRun) -> None:
    """Check every file of a finished run against its records.

    Reads everything and writes nothing. Exits with 11 if a file differs, is missing or is
    unexpected, naming each; with 12 if the run is not finished or cannot be read.
    """
    from job.cli.verify import verify

    verified = verify(output)
    log.info(
        "the run is intact",
        files=verified.files,
        checkpoints=verified.checkpoints,
        read=log.byte_count(verified.bytes),
    )


def clean(
    spec: Annotated[str | None, SPEC] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="The cache folder (overrides runtime.cache_dir).")
    ] = None,
    unused_days: Annotated[
        float, typer.Option(min=0, help="Remove cache entries unused for this many days.")
    ] = 30,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove; by default they are only listed.")
    ] = False,
    set: Overrides = None,
) -> None:
    """List or remove what runs left on this machine.

    Keeps what a running process uses, and whatever the job did not write.
    """
    if set and spec is None:
        raise UsageError(
            "--set",
            "overrides a spec, but no spec is given",
            value=set[0],
            fix="name the spec before it, or use --cache-dir for the folder alone",
        )
    from job.cli.clean import clean

    loaded = load(spec, set, None) if spec else None
    clean(loaded, cache_dir, unused_days=unused_days, remove=remove)


def ask(
    url: Annotated[str, typer.Argument(help="The server, without /v1.", metavar="URL")],
    model: Annotated[str, typer.Option(help="The model's name on the server.")],
    question: Annotated[str, typer.Option(help="What to ask about the image.")],
    image: Annotated[
        Path | None, typer.Option(help="The image; default: a rendered formula.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt: that of data.system, if the spec has one.")
    ] = None,
    no_image: Annotated[bool, typer.Option("--no-image", help="Send no image.")] = False,
    enable_thinking: Annotated[
        bool,
        typer.Option(
            "--enable-thinking/--no-thinking",
            help="Let the model think before it answers, if it was trained with thoughts.",
        ),
    ] = False,
    wait: Annotated[int, typer.Option(help="Seconds to wait for the server to be ready.")] = 0,
) -> None:
    """Ask an OpenAI-compatible server, such as vLLM, about an image."""
    from job.cli.ask import ask

    answer = ask(
        url,
        model,
        question,
        image,
        wait,
        system=system,
        with_image=not no_image,
        enable_thinking=enable_thinking,
    )
    print(redaction.shown(answer))
