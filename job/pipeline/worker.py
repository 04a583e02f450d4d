"""A process beside rank 0, where several train together: it takes part in the training alone.

Everything else is rank 0's: the lease, prep, evaluation, export and every file at the output. This
one waits until it is called to train, and leaves when rank 0 does, with its exit code.
"""

from pathlib import Path
from typing import NoReturn

from job import signals
from job.artifacts.records import StageRecord
from job.distributed.coordinator import Coordinator
from job.pipeline.stages import Stages
from job.spec.load import LoadedSpec


def follow(loaded: LoadedSpec, command: str, coordinator: Coordinator) -> NoReturn:
    """Follows rank 0 to its end."""
    # Rank 0 decides when the job stops, and hears of every signal.
    with signals.deferred():
        try:
            _train(loaded, command, coordinator)
            coordinator.wait_for_end()
        except BaseException as error:  # noqa: BLE001 - whatever it is, rank 0 has to hear of it
            coordinator.fail(error)


def _train(loaded: LoadedSpec, command: str, coordinator: Coordinator) -> None:
    call = coordinator.hear("train")
    stages = Stages(loaded, command, coordinator)
    record = StageRecord.from_json(call["prep"])
    stages.record.add(record)
    world = coordinator.world
    if world.local_rank == 0:
        stages.output.fetch(record)
        stages.models.base()
        coordinator.tell(f"fetched/{world.node}", str(stages.work.path))
    else:
        # The folder of this machine's first process, which holds it for all.
        there = coordinator.hear(f"fetched/{world.node}") if world.node > 0 else call["work"]
        stages.work.share(Path(there))
        stages.output.find_fetched(record)
    stages.fit(stages.work.path)
    if world.local_rank == 0:  # what this machine had of the training is needed no more
        stages.work.remove()
