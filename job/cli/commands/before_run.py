"""Commands for before a run: validate, plan, doctor, reference, schema."""

from math import isfinite
from typing import Annotated

import typer

from job import log
from job.cli import completion, termination
from job.cli.parameters import SPEC, Output, Overrides, Spec, load
from job.errors import UsageError


def validate(spec: Spec, set: Overrides = None, output: Output = None) -> None:
    """Check the spec and report every problem at once."""
    from job import families
    from job.engines import choice
    from job.families import chat_template

    loaded = load(spec, set, output)
    chat_template.require_local(loaded.spec.model)
    family = families.resolve_offline(loaded.spec.model)
    if family is not None:
        choice.require_family(loaded.spec, family.name)
    keys = len(loaded.changed)
    log.info(
        f"{spec} is valid", name=loaded.spec.name, keys_set=keys, output=loaded.spec.output.uri
    )
    if (question := loaded.spec.data.question) is None:
        log.info("no data.instruction: each row must have its own question")
    else:
        log.info("rows without their own question use the instruction", question=question)
    if family is not None and loaded.spec.lora.method == "lora":
        log.info(f"to be served {family.adapter_serving(loaded.spec.lora)}")


def plan(
    spec: Spec,
    accelerator: Annotated[
        str | None,
        typer.Option(
            help="mi300x, h100, h200, a100-80gb, …; default: this machine's, or all of them."
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None,
        typer.Option(min=0, help="The price of one accelerator, to estimate what the job costs."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes that train together, on an accelerator each; default: one."
        ),
    ] = None,
    format: Annotated[str, typer.Option(help="text or json.")] = "text",
    set: Overrides = None,
    output: Output = None,
) -> None:
    """Show what a run would do, need and cost, without running it.

    Exits with 20 if training fits none of the accelerators, naming the smallest change that makes
    it fit, and with 12 if data is missing; the plan is printed either way.
    """
    from job import families
    from job.families import model_source

    if format not in ("text", "json"):
        raise UsageError("--format", "must be text or json", value=format)
    if price_per_hour is not None and not isfinite(price_per_hour):
        raise UsageError(
            "--price-per-hour", "must be a finite number", value=price_per_hour, fix="for example 3"
        )
    loaded = load(spec, set, output)
    uri = loaded.spec.model.model_name_or_path
    model_source.require_hub(loaded.spec, exempt=uri if families.is_known(uri) else None)
    from job import planning

    result = planning.make_plan(
        planning.PlanOptions(
            loaded=loaded,
            accelerator=accelerator,
            price_per_hour=price_per_hour,
            processes=processes,
        )
    )
    print(planning.text(result) if format == "text" else planning.as_json(result))
    planning.refuse_missing_data(result)
    planning.refuse_if_too_large(result)


def doctor(
    spec: Annotated[str | None, SPEC] = None, set: Overrides = None, output: Output = None
) -> None:
    """Check this machine, and the inputs and output of a spec.

    Exits with 0; with 12 if something that the spec names is missing or access to it is denied;
    with 70 if a retry, perhaps on another machine, may succeed.
    """
    from job import doctor

    checks = []
    for check in doctor.run_checks(load(spec, set, output) if spec else None):
        checks.append(check)
        if log.is_json():
            write = {"fail": log.error, "warn": log.warn}.get(check.state, log.info)
            write("doctor", check=check.name, state=check.state, found=check.found, fix=check.fix)
        else:
            print(doctor.text(check), flush=True)
    code = doctor.exit_code(checks)
    if code:
        termination.write_termination_log(
            "\n".join(doctor.text(check) for check in checks if check.state == "fail")
        )
    raise typer.Exit(code)


def schema() -> None:
    """Print the JSON Schema of the spec."""
    from job.spec.validate import schema_text

    print(schema_text(), end="")


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
    """Explain a key of the spec, or all keys."""
    from job.spec import reference as spec_reference

    if format not in ("text", "markdown") or (format == "markdown" and field is not None):
        raise UsageError("--format", "must be text, or markdown without a key", value=format)
    print(spec_reference.reference(field) if format == "text" else spec_reference.page())
