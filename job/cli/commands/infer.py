"""The options of `job infer`; `job.cli.infer` implements it."""

from pathlib import Path
from typing import Annotated

import typer

from job import redaction
from job.cli import completion
from job.cli.parameters import Adapter, Output, Overrides, Spec, load, overrides_from

Images = Annotated[list[Path] | None, typer.Option(help="An image. Repeatable; the order counts.")]
Question = Annotated[
    str | None,
    typer.Option(
        help="Overrides data.instruction; required without it. <image> marks where an image goes."
    ),
]
System = Annotated[str | None, typer.Option(help="System prompt (overrides data.system).")]
RowId = Annotated[
    str | None,
    typer.Option(
        help="Id of a held-out row, as in eval/predictions.jsonl (formulas:0); its label is "
        "printed too.",
        metavar="ID",
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        help="Which weights answer: base, adapter or merged.",
        autocompletion=completion.one_of("base", "adapter", "merged"),
    ),
]
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.")]
Temperature = Annotated[
    float | None, typer.Option(help="Sample at this temperature; default: greedy.")
]
MinP = Annotated[
    float | None,
    typer.Option(help="Sample from tokens at least this likely, relative to the likeliest."),
]
EnableThinking = Annotated[
    bool | None,
    typer.Option("--enable-thinking/--no-thinking", help="Let the model think before it answers."),
]
Seed = Annotated[int | None, typer.Option(help="Seed, to sample the same answer again.")]


def infer(
    spec: Spec,
    image: Images = None,
    question: Question = None,
    system: System = None,
    row: RowId = None,
    weights: Weights = "adapter",
    adapter: Adapter = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    min_p: MinP = None,
    enable_thinking: EnableThinking = None,
    seed: Seed = None,
    set: Overrides = None,
    output: Output = None,
) -> None:
    """Ask the model about images, text or a held-out row.

    The answer is printed as it is generated. Unset options use eval.generation (greedy unless
    do_sample).
    """
    from job.cli.infer import Query, infer
    from job.families import model_source

    samples = True if temperature is not None or min_p is not None else None
    overrides = overrides_from(
        {
            "--max-new-tokens": ("eval.generation.max_new_tokens", max_new_tokens),
            "--temperature": ("eval.generation.temperature", temperature),
            "--min-p": ("eval.generation.min_p", min_p),
            "--temperature or --min-p": ("eval.generation.do_sample", samples),
            "--enable-thinking": ("eval.generation.enable_thinking", enable_thinking),
        }
    )
    loaded = load(spec, [*(set or ()), *overrides], output)
    model_source.require_hub(loaded.spec, also=(adapter,) if adapter else ())
    query = Query(images=tuple(image or ()), question=question, system=system, row=row)
    writer = redaction.RedactingWriter(lambda text: print(text, end="", flush=True))
    infer(loaded, query, weights, adapter, seed=seed, write=writer.write)
    writer.close()
    print()
