"""Runs a process other than rank 0, which takes part in the training only.

Rank 0 does everything else: the lease, prep, evaluation, export and all files at the output. A
worker waits for the training to start, and exits when rank 0 does, with its exit code.
"""

from pathlib import Path
from typing import NoReturn

from job import signals
from job.artifacts.records import StageRecord
from job.distributed.coordinator import Coordinator
from job.errors import naming_full_disk
from job.pipeline import training
from job.pipeline.context import RunContext
from job.spec.load import LoadedSpec


def run(loaded: LoadedSpec, command: str, coordinator: Coordinator) -> NoReturn:
    """Trains with rank 0, and exits when it does."""
    # Rank 0 receives every signal too, and decides when the job stops.
    with signals.deferred():
        try:
            _train(loaded, command, coordinator)
            coordinator.wait_for_end()
        except BaseException as error:  # noqa: BLE001 - any error is reported to rank 0
            coordinator.fail(error)


def _train(loaded: LoadedSpec, command: str, coordinator: Coordinator) -> None:
    context = RunContext(loaded, command, coordinator)
    # Now, because rank 0 prepares and evaluates first, for hours perhaps: a process more than this
    # machine has GPUs, or one that sees none, ends the job at once.
    _ = context.accelerator
    # While rank 0 prepares the rows: it takes seconds.
    import peft  # noqa: F401

    import job.train.train  # noqa: F401

    start = coordinator.wait_for("train", dict)
    prep = StageRecord.from_json(start["prep"])
    context.record.add(prep)
    world = coordinator.world
    if world.local_rank == 0:
        context.output.stages.local.fetch(prep)
        context.models.to_train()
        coordinator.publish(f"fetched/{world.node}", str(context.work.path))
    else:
        # The work folder of this machine's local rank 0, which holds its lock.
        node = world.node
        folder = coordinator.wait_for(f"fetched/{node}", str) if node > 0 else start["work"]
        context.work.share(Path(folder))
        context.output.stages.local.mark_complete(prep.name)
    with naming_full_disk(context.work):
        training.train(context, context.work.path)
    if world.local_rank == 0:  # the training's files on this machine are no longer needed
        context.work.remove()
