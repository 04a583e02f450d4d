"""Starts a job's stages, in a single process or on one of several ranks."""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from job import __version__, log, signals, storage
from job.artifacts.records import PREDICTIONS
from job.distributed import coordinator
from job.distributed.world import World
from job.errors import JobError, Stopped, UsageError
from job.spec.answer_kinds import ALL_METRICS

if TYPE_CHECKING:
    from job.spec.load import LoadedSpec

LAUNCHER_SECONDS = 3.0
"""How long a launcher may take to stop the other processes, once one has ended with an error."""


@contextmanager
def reported_once() -> Iterator[None]:
    """Context for what all processes of a machine find out alike: only the first one reports an
    error, unless it has none.

    The others wait until the launcher stops them, because it would stop the first if they ended
    before it.
    """
    try:
        yield
    except JobError as error:
        if World.from_environment(os.environ).local_rank > 0:
            try:
                time.sleep(LAUNCHER_SECONDS)
            except Stopped:
                signals.exit_now(error.exit_code)
        raise


def silence_other_ranks() -> None:
    """Silences ranks other than 0, before the spec is read, so that warnings appear once."""
    if not World.from_environment(os.environ).is_rank_zero:
        coordinator.silence_logs()


def launch(loaded: "LoadedSpec", command: str) -> None:
    """Runs the command's stages and logs how the metrics changed.

    Does not return on ranks other than 0. Raises UsageError if the number of processes contradicts
    the spec.
    """
    world = World.from_environment(os.environ)
    with reported_once():
        _require_processes(loaded.spec.runtime.distributed, world, command)
    world.export(os.environ)
    # Only now: torch reads its environment variables on import.
    from job.pipeline import runner, worker
    from job.storage.digests import fingerprint

    coordination = None if world.is_single else coordinator.Coordinator(world)
    if coordination is not None:
        shared = {key: value for key, value in loaded.resolved.items() if key != "runtime"}
        kind = loaded.spec.runtime.distributed
        coordination.join(fingerprint(__version__, command, kind, shared))
        if not world.is_rank_zero:
            worker.run(loaded, command, coordination)
    with coordinator.ending_workers(coordination):
        record = runner.run(loaded, command, coordination)
    before, after = record.metrics.get("baseline", {}), record.metrics.get("final", {})
    names = [name for name in after if name in ALL_METRICS]  # others count rows
    log.metrics({name: (before.get(name), after[name]) for name in names})
    _log_validation(record.validation)
    for warning in record.warnings:
        log.warn(warning)
    output = loaded.spec.output.uri
    if command != "run":
        log.info("done", output=output)
        return
    from job.evaluation.report import REPORT

    made = {"report": storage.join(output, REPORT)} if "report" in record.stages else {}
    log.info("done", output=output, **made)
    if (question := asking(output)) is not None:
        log.info("ask the model", command=question)


def asking(output: str) -> str | None:
    """The command that asks the trained model about a held-out row, as this one was called.

    None if other code called, or if the rows' ids cannot be read: the run has succeeded all the
    same.
    """
    words = list(sys.orig_argv)
    if "run" not in words:
        return None
    words[words.index("run")] = "infer"
    with suppress(JobError), storage.open_read(storage.join(output, PREDICTIONS)) as lines:
        return shlex.join([*words, "--row", json.loads(lines.readline())["id"]])
    return None


def _log_validation(chosen: Mapping[str, Any] | None) -> None:
    """Logs the step whose model is kept, beside the best and the last."""
    if chosen is None:
        return
    values = {"best": chosen["best"], "last_step": chosen["last_step"], "last": chosen["last"]}
    log.info(
        f"the model is that of step {chosen['exported_step']}",
        metric=chosen["metric"],
        best_step=chosen["best_step"],
        **values,
        **({"stopped_early": True} if chosen["stopped_early"] else {}),
    )


def _require_processes(distributed: str, world: World, command: str) -> None:
    if distributed == "none" and not world.is_single:
        raise UsageError(
            "$.runtime.distributed",
            f"is none, but the job was started as one of {world.size} processes",
            fix="set it to auto, ddp or fsdp2, or start one process",
        )
    if distributed in ("ddp", "fsdp2") and world.is_single and command != "prep":
        raise UsageError(
            "$.runtime.distributed",
            "needs several processes, but the job was started as one",
            value=distributed,
            fix=f"start it with, say, `torchrun --nproc-per-node 2 -m job {command} SPEC`, or set "
            "auto",
        )
