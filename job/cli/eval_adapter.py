"""`job eval --adapter`: evaluates any adapter on the spec's held-out rows.

Nothing is written at the spec's output: its results are those of its own training.
"""

import re
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from job import log, storage
from job.artifacts import reader
from job.artifacts.nesting import run_containing
from job.artifacts.records import STAGES, read_stage
from job.errors import InputError, MissingInputError, UsageError
from job.evaluation.evaluate import EVAL
from job.families import adapter_source
from job.pipeline.context import RunContext
from job.pipeline.stages import Stages
from job.prep.rows import Row
from job.prep.shards import Rows, order_file, shard_paths
from job.spec.load import LoadedSpec

OPTION = "--adapter"
RESULT, PREDICTIONS = "adapter", "adapter.predictions.jsonl"


def eval_adapter(loaded: LoadedSpec, uri: str, to: Path | None) -> None:
    """Evaluates the base with the adapter at `uri`, and logs its metrics.

    With `to`, also writes `eval/adapter.json` and the predictions there. Raises InputError if the
    adapter is missing or does not fit the model, and UsageError if `to` is inside a run's output.
    """
    if to is not None:
        if (run_of := run_containing(str(storage.resolved_path(str(to))))) is not None:
            raise UsageError(
                "--to",
                f"is inside the output of a run, {run_of}",
                value=to,
                fix="name a folder outside of it",
            )
        storage.check_access(str(to), "write")
    run = RunContext(loaded, "eval")
    stored = run.read_adapter(adapter_source.find_adapter(uri, OPTION), "evaluating the adapter")
    with ExitStack() as stack:
        rows = _held_out_rows(run, stack)
        import torch

        from job.evaluation.evaluate import evaluate, write

        model = run.models.initial(stored)
        torch.manual_seed(0)  # as in the stages
        evaluation = evaluate(
            model,
            run.family,
            rows,
            run.spec.eval,
            batch_size=run.spec.train.per_device_eval_batch_size,
            label="evaluate the adapter",
        )
    log.info("adapter", **evaluation.metrics, turns=evaluation.turns)
    if to is not None:
        try:
            write(evaluation, to, RESULT, PREDICTIONS)
        except OSError as error:
            raise InputError(
                "--to",
                f"cannot be written: {error.strerror}",
                value=to,
                fix="name a folder that this user may write to",
            ) from error
        log.info("written", results=to / EVAL)


def _held_out_rows(run: RunContext, stack: ExitStack) -> Sequence[Row]:
    """The held-out rows: of the run at the output if it has the same, else prepared here.

    Rows prepared here are in a temporary folder, which `stack` removes.
    """
    with suppress(MissingInputError):
        prep = read_stage(run.output.at(STAGES, "prep.json"))
        if prep.fingerprint == run.fingerprint("prep"):
            return _read(
                reader.fetch(
                    run.output.uri,
                    "prep",
                    "data",
                    run.cache_dir,
                    run.cache_limit,
                    only=re.compile(r"data/(eval-order\.npy|eval-.*\.arrow)"),
                )
            )
    run.cache_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=run.cache_dir)))
    Stages(run).prep(folder)
    return _read(folder / "data")


def _read(folder: Path) -> Rows:
    order = order_file(folder, "eval")
    return Rows(shard_paths(folder, "eval"), order if order.exists() else None)
