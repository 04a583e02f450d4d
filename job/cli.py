"""The command line: what each command does is in its help, what it means in `docs/`."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from job import __version__, log, redaction, signals
from job.errors import (
    OK,
    STOPPED,
    USAGE,
    OutOfMemoryError,
    Told,
    UsageError,
    told,
)

if TYPE_CHECKING:
    from job.spec.load import LoadedSpec

TERMINATION_LOG = Path("/dev/termination-log")
TERMINATION_LIMIT = 4096  # bytes that the kubelet reads of it
DEBUG = "--debug"

app = typer.Typer(
    name="job",
    help="Fine-tunes a vision-language model from a YAML spec: prep, train, eval, export.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Spec = Annotated[str, typer.Argument(help="The spec, a YAML file by path or URI.", metavar="SPEC")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Overrides a key: --set train.max_steps=5", metavar="KEY=VALUE"),
]
OutputUri = Annotated[
    str | None, typer.Option("--output", "-o", help="Where results go, in place of output.uri.")
]


@app.callback()
def _options(
    log_format: Annotated[
        str, typer.Option(help="auto (a bar on a terminal, else text), text or json.")
    ] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
    if log_format not in ("auto", "text", "json"):
        raise UsageError("--log-format", "must be auto, text or json", value=log_format)
    level: log.Level = "WARNING" if quiet else "DEBUG" if verbose or debug else "INFO"
    log.configure(log_format, level)  # type: ignore[arg-type]


@app.command()
def run(spec: Spec, set: Sets = None, output: OutputUri = None) -> None:
    """Run every stage: prep → train → eval → export. Complete stages are skipped.

    [dim]Example:[/] python -m job run specs/latex.yaml --set train.max_steps=5 --output /tmp/out
    """
    _pipeline("run", spec, set, output)


@app.command()
def prep(spec: Spec, set: Sets = None, output: OutputUri = None) -> None:
    """Read, check and split the data."""
    _pipeline("prep", spec, set, output)


@app.command()
def train(spec: Spec, set: Sets = None, output: OutputUri = None) -> None:
    """Train, after prep; leaves the adapter."""
    _pipeline("train", spec, set, output)


@app.command(name="eval")
def evaluate(spec: Spec, set: Sets = None, output: OutputUri = None) -> None:
    """Evaluate before and after training."""
    _pipeline("eval", spec, set, output)


@app.command()
def export(spec: Spec, set: Sets = None, output: OutputUri = None) -> None:
    """Write the merged weights and prove them against the trained model."""
    _pipeline("export", spec, set, output)


@app.command()
def validate(spec: Spec, set: Sets = None, output: OutputUri = None) -> None:
    """Check the spec; every problem at once."""
    from job import families

    loaded = _load(spec, set, output)
    keys = len(loaded.changed)
    log.info(
        f"{spec} is valid", name=loaded.spec.name, keys_set=keys, output=loaded.spec.output.uri
    )
    family = families.expected(loaded.spec.model)
    if family is not None and loaded.spec.lora.method == "lora":
        log.info(f"to be served {family.adapter_serving(loaded.spec.lora)}")


@app.command()
def plan(spec: Spec, set: Sets = None, output: OutputUri = None) -> None:
    """Say what a run would do, without doing it."""
    from job.plan import plan as make

    print(make(_load(spec, set, output)))


@app.command()
def infer(
    spec: Spec,
    image: Annotated[Path | None, typer.Option(help="The picture to read.")] = None,
    question: Annotated[str | None, typer.Option(help="Instead of data.instruction.")] = None,
    weights: Annotated[str, typer.Option(help="base, adapter or merged.")] = "adapter",
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sample, this freely.")] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Sample tokens at least this likely, as a share of the likeliest."),
    ] = None,
    enable_thinking: Annotated[
        bool | None, typer.Option(help="Let the model think before it answers.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Sample the same answer again.")] = None,
    set: Sets = None,
    output: OutputUri = None,
) -> None:
    """Answer for an image or a question with the base, the adapter or the merged weights.

    The answer is shown as it is written. What is not said is as eval.generation of the spec says,
    which takes the likeliest tokens unless it samples.

    [dim]Example:[/] python -m job infer specs/latex.yaml --image formula.png --temperature 1.5
    --min-p 0.1 --max-new-tokens 128
    """
    from job.infer import infer as answer

    samples = True if temperature is not None or min_p is not None else None
    said = {
        "max_new_tokens": max_new_tokens,
        "do_sample": samples,
        "temperature": temperature,
        "min_p": min_p,
        "enable_thinking": enable_thinking,
    }
    chosen = [
        f"eval.generation.{name}={json.dumps(value)}"
        for name, value in said.items()
        if value is not None
    ]
    loaded = _load(spec, [*(set or ()), *chosen], output)
    answer(
        loaded,
        image,
        question,
        weights,
        seed=seed,
        write=lambda text: print(text, end="", flush=True),
    )
    print()


@app.command()
def fetch(
    uri: Annotated[str, typer.Argument(help="The output of a finished run.", metavar="URI")],
    to: Annotated[Path, typer.Option(help="The folder to put the files into.")],
    part: Annotated[str, typer.Option(help="adapter, merged, or another folder of it.")] = "merged",
) -> None:
    """Bring a part of a finished run here, checked by its digests."""
    from job.fetch import fetch as bring

    log.info(f"{part} is complete", files=bring(uri, part, to), folder=to)


@app.command()
def ask(
    url: Annotated[str, typer.Argument(help="The server, without /v1.", metavar="URL")],
    model: Annotated[str, typer.Option(help="The name that the server gives the model.")],
    question: Annotated[str, typer.Option(help="What to ask about the image.")],
    image: Annotated[Path | None, typer.Option(help="The image; a drawn formula without.")] = None,
    no_image: Annotated[bool, typer.Option("--no-image", help="Ask about no image.")] = False,
    wait: Annotated[int, typer.Option(help="Seconds to wait for the server to be ready.")] = 0,
) -> None:
    """Ask a server that speaks OpenAI's protocol, such as vLLM, about an image."""
    from job.ask import ask as put

    print(put(url, model, question, image, wait, shown=not no_image))


@app.command()
def manifest(
    spec: Spec,
    platform: Annotated[str, typer.Option(help="amd, nvidia or cpu.")] = "amd",
    nodes: Annotated[
        int,
        typer.Option(help="More than one make it a TrainJob, which this version refuses to run."),
    ] = 1,
    kind: Annotated[str, typer.Option(help="job, trainjob, vllm or vllm-smoke.")] = "job",
    registry: Annotated[str | None, typer.Option(help="Where your images are.")] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Write all manifests with their overlays into this folder.")
    ] = None,
    smoke: Annotated[
        str | None, typer.Option(help="With --directory, the spec of its test on a CPU.")
    ] = None,
    set: Sets = None,
    output: OutputUri = None,
) -> None:
    """Print the Kubernetes manifest of a job, or write all of them.

    [dim]Example:[/] python -m job manifest specs/latex.yaml --platform cpu | kubectl apply -f -
    """
    from job import manifests

    order = manifests.Order(
        spec=spec, sets=tuple(set or ()), output=output, registry=registry, environ=os.environ
    )
    if directory is not None:
        written = manifests.folder(order, nodes, smoke)
        manifests.write(directory, written)
        log.info("written", files=len(written), folder=directory)
    else:
        print(manifests.render(order, platform, nodes, kind), end="")
        if kind in ("job", "trainjob") and nodes > 1:
            log.warn(manifests.REFUSED, nodes=nodes)


@app.command()
def doctor(
    spec: Annotated[
        str | None, typer.Argument(help="Look at what it names and needs too.", metavar="[SPEC]")
    ] = None,
    set: Sets = None,
    output: OutputUri = None,
) -> None:
    """Check the machine and, for a spec, its inputs and its output, before anything is spent.

    Ends with 0, with 12 where what the spec names is missing or denied, or with 70 where another
    try, perhaps on another machine, may go better.
    """
    from job import doctor as checks

    found = []
    for check in checks.doctor(_load(spec, set, output) if spec else None):
        found.append(check)
        if log.is_json():
            say = {"fail": log.error, "warn": log.warn}.get(check.state, log.info)
            say("doctor", check=check.name, state=check.state, found=check.found, fix=check.fix)
        else:
            print(checks.screen(check), flush=True)
    code = checks.exit_code(found)
    if code:
        _leave_for_the_kubelet(
            "\n".join(checks.screen(check) for check in found if check.state == "fail")
        )
    raise typer.Exit(code)


@app.command()
def schema() -> None:
    """Print the spec's JSON Schema."""
    from job.spec.validate import schema_text

    print(schema_text(), end="")


@app.command()
def reference(
    field: Annotated[str | None, typer.Argument(help="A key, such as train.optim.")] = None,
) -> None:
    """Print what a key of the spec means; all keys without one."""
    from job.spec.reference import reference as describe

    print(describe(field))


def _pipeline(command: str, spec: str, sets: list[str] | None, output: str | None) -> None:
    for name in ("WORLD_SIZE", "PET_NNODES"):
        if os.environ.get(name, "1") != "1":
            raise UsageError(
                name,
                "this version trains in one process; several would overwrite each other's results",
                value=os.environ[name],
                fix="start one process on one node",
            )
    loaded = _load(spec, sets, output)
    from job import pipeline

    record = pipeline.run(loaded, command)
    before, after = record.metrics.get("baseline", {}), record.metrics.get("final", {})
    for name in after:
        if name != "rows":
            was = f"{before[name]:.4g} → " if name in before else ""
            log.info(f"{name}: {was}{after[name]:.4g}")
    log.info("done", output=loaded.spec.output.uri)


def _load(spec: str, sets: list[str] | None, output: str | None) -> "LoadedSpec":
    from job import storage
    from job.spec.load import load_spec
    from job.spec.overrides import with_output
    from job.spec.parse import MAX_BYTES, decode

    text = decode(storage.read_bytes(spec, MAX_BYTES + 1), spec)
    return load_spec(text, spec, with_output(sets or (), output))


def main() -> NoReturn:
    """Runs the command line and leaves with the exit code of what happened."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the job
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - to the end
    redaction.install()
    signals.install(_report)
    from typer.rich_utils import rich_format_error

    try:
        code = app(standalone_mode=False) or OK
    except typer.TyperException as error:
        error.message = redaction.redact(error.message)
        rich_format_error(error)  # type: ignore[arg-type]
        code = getattr(error, "exit_code", USAGE)
    except Told as error:
        signals.taken()
        code = _report(error)
    except Exception as error:  # noqa: BLE001 - the last stop: no traceback reaches a user unasked
        code = _report(told(error))
    sys.stdout.flush()
    sys.stderr.flush()
    if code == OutOfMemoryError.exit_code:
        os._exit(code)  # the libraries' farewells need memory too, and fail loudly without
    if code == STOPPED:
        signals.leave(code)  # a transfer under way may take longer than there is
    sys.exit(code)


def _report(error: Told) -> int:
    """Says what is wrong and leaves it for the kubelet; gives the exit code."""
    if DEBUG in sys.argv:
        redaction.print_traceback(error)
    text = str(error)
    log.error(f"{error.title} (exit {error.exit_code})")
    print(text, file=sys.stderr)
    _leave_for_the_kubelet(f"{error.title}\n{text}")
    return error.exit_code


def _leave_for_the_kubelet(text: str) -> None:
    """Writes it to where `kubectl describe` shows it from, if there is such a place."""
    if TERMINATION_LOG.exists():
        message = redaction.redact(text).encode()[:TERMINATION_LIMIT]
        TERMINATION_LOG.write_bytes(message.decode(errors="ignore").encode())
