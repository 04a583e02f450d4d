"""The command line: what each command does is in its help, what it means in `docs/`."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from job import __version__, log, redaction, signals
from job.cli import completion, help, launch, termination
from job.errors import OK, ReportedError, UsageError, reported

if TYPE_CHECKING:
    from job.spec.load import LoadedSpec
    from job.spec.overrides import Override

app = typer.Typer(
    name="job",
    cls=help.Commands,
    help="Fine-tunes a vision-language model from a YAML spec: prep, train, eval, export.",
    no_args_is_help=True,
    add_completion=False,  # it would complete for every use of python
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Spec = Annotated[str, typer.Argument(help="The spec, a YAML file by path or URI.", metavar="SPEC")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Overrides a key of the spec; as often as you like.",
        metavar="KEY=VALUE",
        autocompletion=completion.settings,
    ),
]
OutputUri = Annotated[
    str | None,
    typer.Option("--output", "-o", help="Where results go, in place of output.uri.", metavar="URI"),
]


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


def _show_completion(asked: bool) -> None:
    if asked:
        print(completion.script(completion.current_shell()), end="")
        raise typer.Exit


def _install_completion(asked: bool) -> None:
    if asked:
        shell = completion.current_shell()
        place, start = completion.install(shell)
        print(f"{place} is written, and {start} reads it: start a new {shell}")
        raise typer.Exit


@app.callback()
def _options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also inputs, fingerprints, files stored.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(termination.DEBUG, help="As --verbose, with the traceback of an error.")
    ] = False,
    log_format: Annotated[
        str,
        typer.Option(
            help="auto (a bar on a terminal, else text), text or json.",
            metavar="FORMAT",
            autocompletion=completion.one_of("auto", "text", "json"),
        ),
    ] = "auto",
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
    install_completion: Annotated[
        bool,
        typer.Option(
            "--install-completion",
            help="Set up completion for the shell that you call it from.",
            callback=_install_completion,
            is_eager=True,
        ),
    ] = False,
    show_completion: Annotated[
        bool,
        typer.Option(
            "--show-completion",
            help="Print that shell's completion, for you to place.",
            callback=_show_completion,
            is_eager=True,
        ),
    ] = False,
) -> None:
    if log_format not in ("auto", "text", "json"):
        raise UsageError("--log-format", "must be auto, text or json", value=log_format)
    level: log.Level = "WARNING" if quiet else "DEBUG" if verbose or debug else "INFO"
    log.configure(log_format, level)  # type: ignore[arg-type]


@app.command()
def run(spec: Spec, set: Sets = None, output: OutputUri = None) -> None:
    """Run every stage: prep → train → eval → export. Complete ones are skipped."""
    _start("run", spec, set, output)


@app.command()
def prep(spec: Spec, set: Sets = None, output: OutputUri = None) -> None:
    """Read, check and split the data."""
    _start("prep", spec, set, output)


@app.command()
def train(spec: Spec, set: Sets = None, output: OutputUri = None) -> None:
    """Train, after prep; leaves the adapter."""
    _start("train", spec, set, output)


@app.command(name="eval")
def evaluate(spec: Spec, set: Sets = None, output: OutputUri = None) -> None:
    """Evaluate before and after training."""
    _start("eval", spec, set, output)


@app.command()
def export(
    spec: Spec,
    verify: Annotated[
        str | None,
        typer.Option(
            help="none, reload or vllm: how to prove it, in place of export.verify.",
            autocompletion=completion.one_of("none", "reload", "vllm"),
        ),
    ] = None,
    set: Sets = None,
    output: OutputUri = None,
) -> None:
    """Write the merged weights and prove them against the trained model."""
    chosen = _settings({"--verify": ("export.verify", verify)})
    _start("export", spec, [*(set or ()), *chosen], output)


@app.command()
def validate(spec: Spec, set: Sets = None, output: OutputUri = None) -> None:
    """Check the spec; every problem at once."""
    from job import families

    loaded = _load(spec, set, output)
    keys = len(loaded.changed)
    log.info(
        f"{spec} is valid", name=loaded.spec.name, keys_set=keys, output=loaded.spec.output.uri
    )
    if (asked := loaded.spec.data.question) is None:
        log.info("no data.instruction is set: each row must ask its own question")
    else:
        log.info("rows without a question of their own ask", question=asked)
    family = families.expected(loaded.spec.model)
    if family is not None and loaded.spec.lora.method == "lora":
        log.info(f"to be served {family.adapter_serving(loaded.spec.lora)}")


@app.command()
def plan(
    spec: Spec,
    accelerator: Annotated[
        str | None,
        typer.Option(help="mi300x, h100, h200, a100-80gb, …; without, this machine's or all."),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of the accelerator, to tell what training costs.")
    ] = None,
    format: Annotated[str, typer.Option(help="text or json.")] = "text",
    set: Sets = None,
    output: OutputUri = None,
) -> None:
    """Say what a run would do, take and cost, without doing it.

    Ends with 20 where training fits none of the accelerators, naming the nearest change that does,
    and with 12 where data is missing; the rest is told all the same.
    """
    from job import families
    from job.families import model_source

    if format not in ("text", "json"):
        raise UsageError("--format", "must be text or json", value=format)
    loaded = _load(spec, set, output)
    uri = loaded.spec.model.model_name_or_path
    model_source.require_hub(loaded.spec, but=uri if families.is_known(uri) else None)
    from job import planning as plans

    made = plans.make(
        plans.Order(
            loaded=loaded,
            accelerator=accelerator,
            price_per_hour=price_per_hour,
        )
    )
    print(plans.text(made) if format == "text" else plans.as_json(made))
    plans.refuse_missing_data(made)
    plans.refuse_what_does_not_fit(made)


@app.command()
def infer(
    spec: Spec,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="The image to read; several in their order, each with its own --image."),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(
            help="Instead of data.instruction, and needed without it; <image> in it is where an "
            "image stands."
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="What the system's turn says, instead of data.system.")
    ] = None,
    row: Annotated[
        str | None,
        typer.Option(
            help="A held-out row of the output by its id, answered beside its label.", metavar="ID"
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="base, adapter or merged.",
            autocompletion=completion.one_of("base", "adapter", "merged"),
        ),
    ] = "adapter",
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sample, this freely; without, the likeliest tokens.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Sample tokens at least this likely, as a share of the likeliest."),
    ] = None,
    enable_thinking: Annotated[
        bool | None,
        typer.Option(
            "--enable-thinking/--no-thinking", help="Let the model think before it answers."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Sample the same answer again.")] = None,
    set: Sets = None,
    output: OutputUri = None,
) -> None:
    """Answer for images, a question or a held-out row, with base, adapter or merged weights.

    The answer is printed as it is generated. Unset options use eval.generation (greedy unless
    do_sample).
    """
    from job.cli.infer import Asked
    from job.cli.infer import infer as answer
    from job.families import model_source

    samples = True if temperature is not None or min_p is not None else None
    chosen = _settings(
        {
            "--max-new-tokens": ("eval.generation.max_new_tokens", max_new_tokens),
            "--temperature": ("eval.generation.temperature", temperature),
            "--min-p": ("eval.generation.min_p", min_p),
            "--temperature or --min-p": ("eval.generation.do_sample", samples),
            "--enable-thinking": ("eval.generation.enable_thinking", enable_thinking),
        }
    )
    loaded = _load(spec, [*(set or ()), *chosen], output)
    model_source.require_hub(loaded.spec)
    screen = redaction.Screen(lambda text: print(text, end="", flush=True))
    answer(
        loaded,
        Asked(images=tuple(image or ()), question=question, system=system, row=row),
        weights,
        seed=seed,
        write=screen.write,
    )
    screen.close()
    print()


@app.command()
def fetch(
    uri: Annotated[str, typer.Argument(help="The output of a finished run.", metavar="URI")],
    to: Annotated[Path, typer.Option(help="The folder to put the files into.")],
    part: Annotated[
        str,
        typer.Option(
            help="adapter, merged, or another folder of it.",
            autocompletion=completion.one_of("adapter", "adapter-vllm", "merged"),
        ),
    ] = "merged",
) -> None:
    """Bring a part of a finished run here, checked by its digests."""
    from job.cli.fetch import fetch as bring

    log.info(f"{part} is complete", files=bring(uri, part, to), folder=to)


@app.command()
def verify(
    output: Annotated[str, typer.Argument(help="The output of a finished run.", metavar="OUTPUT")],
) -> None:
    """Check every file of a finished run against its records; reads all, writes nothing.

    Ends with 11 where a file differs, is missing or is too many, and names each; with 12 where
    the run is not finished or may not be read.
    """
    from job.cli.verify import verify as check

    found = check(output)
    log.info(
        "the run is whole",
        files=found.files,
        checkpoints=found.checkpoints,
        read=log.amount(found.bytes),
    )


@app.command()
def clean(
    spec: Annotated[
        str | None, typer.Argument(help="Look where it keeps its files.", metavar="SPEC")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="The cache, in place of runtime.cache_dir.")
    ] = None,
    unused_days: Annotated[
        float, typer.Option(min=0, help="Cache entries not used for so long go.")
    ] = 30,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove what goes; without, it is only listed.")
    ] = False,
    set: Sets = None,
) -> None:
    """List what runs and downloads left on this machine, and remove it.

    What a living process holds stays, and so does everything that is not the job's.
    """
    if set and spec is None:
        raise UsageError(
            "--set",
            "changes a spec, and none is named",
            value=set[0],
            fix="name the spec before it, or --cache-dir for the folder alone",
        )
    from job.cli import clean as cleaning

    cleaning.clean(
        _load(spec, set, None) if spec else None,
        cache_dir,
        unused_days=unused_days,
        remove=remove,
    )


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
    from job.cli.ask import ask as put

    print(redaction.shown(put(url, model, question, image, wait, shown=not no_image)))


@app.command()
def manifest(
    spec: Spec,
    platform: Annotated[
        str,
        typer.Option(
            help="amd, nvidia or cpu.", autocompletion=completion.one_of("amd", "nvidia", "cpu")
        ),
    ] = "amd",
    nodes: Annotated[int, typer.Option(help="More than one make it a TrainJob.")] = 1,
    kind: Annotated[
        str,
        typer.Option(
            help="job, trainjob, vllm or vllm-smoke.",
            autocompletion=completion.one_of("job", "trainjob", "vllm", "vllm-smoke"),
        ),
    ] = "job",
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
    """Print the Kubernetes manifest of a job, or write all of them."""
    from job import kubernetes

    order = kubernetes.Order(
        spec=spec, sets=tuple(set or ()), output=output, registry=registry, environ=os.environ
    )
    if directory is not None:
        written = kubernetes.folder(order, nodes, smoke)
        kubernetes.write(directory, written)
        log.info("written", files=len(written), folder=directory)
    else:
        print(kubernetes.render(order, platform, nodes, kind), end="")


@app.command()
def doctor(
    spec: Annotated[
        str | None, typer.Argument(help="Look at what it names and needs too.", metavar="SPEC")
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
        termination.leave_for_the_kubelet(
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
    field: Annotated[
        str | None,
        typer.Argument(
            help="A key, such as train.optim.",
            metavar="FIELD",
            autocompletion=completion.spec_keys,
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="text, or markdown for all keys.",
            autocompletion=completion.one_of("text", "markdown"),
        ),
    ] = "text",
) -> None:
    """Print what a key of the spec means; all keys without one."""
    from job.spec import reference as spec_reference

    if format not in ("text", "markdown") or (format == "markdown" and field is not None):
        raise UsageError("--format", "must be text, or markdown without a key", value=format)
    print(spec_reference.reference(field) if format == "text" else spec_reference.page())


def _settings(said: Mapping[str, tuple[str, object]]) -> "list[Override]":
    """What options say of the keys that they are for, without those that say nothing."""
    from job.spec.overrides import KeyValue

    return [
        KeyValue(option, key, value if isinstance(value, str) else json.dumps(value))
        for option, (key, value) in said.items()
        if value is not None
    ]


def _start(command: str, spec: str, sets: "Sequence[Override] | None", output: str | None) -> None:
    from job.families import model_source

    launch.silence_all_but_the_first()
    loaded = _load(spec, sets, output)
    model_source.require_hub(loaded.spec)
    launch.launch(loaded, command)


def _load(spec: str, sets: "Sequence[Override] | None", output: str | None) -> "LoadedSpec":
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
    # Processes that it starts look for modules in the current folder no more than it does itself.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    redaction.install()
    signals.install(termination.report)
    completion.prepare()
    try:
        code = app(standalone_mode=False, complete_var=completion.VARIABLE) or OK
    except typer.TyperException as error:
        code = termination.report_usage(error)
    except (ReportedError, Exception) as error:  # noqa: BLE001 - no traceback reaches a user unasked
        signals.taken()
        code = termination.report(reported(signals.end_of(error)))
    termination.leave(code)
