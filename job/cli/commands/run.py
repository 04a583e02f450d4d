"""Commands that run a spec's stages: run, prep, train, eval, export."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from job.cli import completion, launch
from job.cli.parameters import Adapter, Output, Overrides, Spec, load, overrides_from
from job.errors import UsageError

if TYPE_CHECKING:
    from job.spec.overrides import Override


def run(spec: Spec, set: Overrides = None, output: Output = None) -> None:
    """Run all stages: prep → train → eval → export. Completed stages are skipped.

    If the spec has a section reinforce, that stage comes after train.
    """
    _start("run", spec, set, output)


def prep(spec: Spec, set: Overrides = None, output: Output = None) -> None:
    """Read, check and split the data."""
    _start("prep", spec, set, output)


def train(spec: Spec, set: Overrides = None, output: Output = None) -> None:
    """Prepare the data and train the adapter.

    If the spec has a section reinforce, it is reinforced too.
    """
    _start("train", spec, set, output)


def evaluate(
    spec: Spec,
    adapter: Adapter = None,
    to: Annotated[
        Path | None, typer.Option(help="With --adapter, write the results to this folder.")
    ] = None,
    set: Overrides = None,
    output: Output = None,
) -> None:
    """Evaluate the model before and after training.

    With --adapter, evaluates that adapter instead, whatever trained it, and writes nothing at the
    output.
    """
    if adapter is None:
        if to is not None:
            raise UsageError("--to", "requires --adapter: a run's results go to its output")
        _start("eval", spec, set, output)
        return
    from job.cli.eval_adapter import eval_adapter
    from job.families import model_source

    loaded = load(spec, set, output)
    model_source.require_hub(loaded.spec, also=(adapter,))
    eval_adapter(loaded, adapter, to)


def export(
    spec: Spec,
    verify: Annotated[
        str | None,
        typer.Option(
            help="none, reload or vllm: how to verify the export (overrides export.verify).",
            autocompletion=completion.one_of("none", "reload", "vllm"),
        ),
    ] = None,
    set: Overrides = None,
    output: Output = None,
) -> None:
    """Write the merged weights and verify them."""
    overrides = overrides_from({"--verify": ("export.verify", verify)})
    _start("export", spec, [*(set or ()), *overrides], output)


def _start(
    command: str, spec: str, overrides: "Sequence[Override] | None", output: str | None
) -> None:
    from job.families import model_source

    launch.silence_other_ranks()
    with launch.reported_once():
        loaded = load(spec, overrides, output)
        model_source.require_hub(loaded.spec)
    launch.launch(loaded, command)
