"""`job init`: writes a spec for rows of one's own."""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from job import log, redaction
from job.cli import completion
from job.errors import UsageError

if TYPE_CHECKING:
    from job.drafting import Draft

TOY = "builtin://ernie-vl-tiny"
KINDS = ("text", "latex", "json", "label")


def init(
    data: Annotated[
        str,
        typer.Argument(
            help="The rows: a list, a table, or a folder of images, by path or URI.",
            metavar="DATA",
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="The spec to write; default: NAME.yaml.", metavar="FILE"
        ),
    ] = None,
    output_uri: Annotated[
        str | None,
        typer.Option(help="Where the job's results go; default: outputs/NAME.", metavar="URI"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the job; default: after the data.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="The model to fine-tune; default: a toy to try the spec.", metavar="URI"),
    ] = TOY,
    instruction: Annotated[
        str | None,
        typer.Option(help="What is asked about each image, if rows have no question."),
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            help="Kind of answers: text, latex, json or label; default: guessed.",
            autocompletion=completion.one_of(*KINDS),
        ),
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the image.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the answer.")] = None,
    question_column: Annotated[str | None, typer.Option(help="Column of the question.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a spec for rows of your own: columns, kind of answers, lengths, splits.

    Reads the first rows and asks what they do not tell. Without a terminal, options answer.
    """
    from job import drafting, storage

    if answer is not None and answer not in KINDS:
        raise UsageError("--answer", f"must be one of {', '.join(KINDS)}", value=answer)
    if name is not None and name != drafting.as_name(name):
        raise UsageError(
            "--name", "must be lower-case letters, digits and hyphens", value=name,
            fix=f"write {drafting.as_name(name) or drafting.NO_NAME}",
        )  # fmt: skip
    unnamed = name is None and drafting.job_name(data) == drafting.NO_NAME
    name = name or drafting.job_name(data)
    path = output or f"{name}.yaml"
    if not force and storage.exists(path):
        raise _exists(path)
    columns = {"image": image_column, "text": text_column, "question": question_column}
    terminal = log.is_terminal(sys.stdin) and log.is_terminal(sys.stderr)
    draft = drafting.make_draft(
        drafting.DraftOptions(
            uri=data.rstrip("/") or data,
            name=name,
            model=model,
            output_uri=output_uri or f"outputs/{name}",
            instruction=instruction,
            answer=answer,  # type: ignore[arg-type]
            columns={key: column for key, column in columns.items() if column is not None},
            choose=_choose if terminal else None,
            ask=_ask if terminal else None,
        )
    )
    text = drafting.spec_text(draft, path)
    if force:
        storage.write_text(path, text)
    elif not storage.write_new(path, text.encode()):
        raise _exists(path)
    _report(draft, path, unnamed=unnamed)


def _report(draft: "Draft", path: str, *, unnamed: bool) -> None:
    if draft.rejects:
        first = draft.rejects[0]
        log.warn(
            "some rows cannot be used",
            rows=f"{len(draft.rejects)} of the first {draft.sampled}",
            first=f"{first.id}: {first.reason}",
        )
    columns = ", ".join(f"{key}: {column}" for key, column in draft.columns.items())
    log.info(
        f"wrote {path}",
        rows=draft.rows,
        answer=draft.answer.kind,
        next=f"python -m job validate {path}",
        **({"columns": columns} if columns else {}),
    )
    if unnamed:
        log.info(
            "no part of DATA could name the job",
            name=draft.options.name,
            fix="--name NAME, which also names the spec and the output",
        )


def _exists(path: str) -> UsageError:
    return UsageError(
        "--output", "exists already", value=path, fix="write --force to replace it, or another name"
    )


def _ask(question: str, proposal: str) -> str:
    return _prompt(question, proposal, str.strip)


def _choose(question: str, choices: Sequence[str]) -> str:
    def choice(value: str) -> str:
        if value.strip() not in choices:
            raise typer.BadParameter(f"write one of {', '.join(choices)}")
        return value.strip()

    return _prompt(f"{question} ({', '.join(choices)})", choices[0], choice)


def _prompt(question: str, proposal: str, read: Callable[[str], str]) -> str:
    try:
        answer: str = typer.prompt(
            redaction.shown(question), default=proposal, value_proc=read, err=True
        )
    except typer.Abort as error:
        raise UsageError("init", "was left without an answer; nothing is written") from error
    return answer
