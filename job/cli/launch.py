"""The start of a job's stages: in this process alone, or in this one among several."""

import os
from typing import TYPE_CHECKING

from job import __version__, log
from job.distributed import coordinator
from job.distributed.world import World
from job.errors import UsageError
from job.spec.answer_kinds import MEASURED

if TYPE_CHECKING:
    from job.spec.load import LoadedSpec


def silence_all_but_the_first() -> None:
    """To be called before the spec is read: what there is to warn of is warned of once."""
    if not World.from_environment(os.environ).is_rank_zero:
        coordinator.silence_logs()


def launch(loaded: "LoadedSpec", command: str) -> None:
    """Runs the command's stages and says what became of the metrics.

    In another process than the first it follows that one, and does not come back. Raises
    UsageError where the job is not started as the spec wants it.
    """
    here = World.from_environment(os.environ)
    _require_processes(loaded.spec.runtime.distributed, here)
    here.export(os.environ)
    # Only now: torch reads its variables when it is imported.
    from job.pipeline import runner, worker
    from job.storage.digests import fingerprint

    together = None if here.is_single else coordinator.Coordinator(here)
    if together is not None:
        shared = {key: value for key, value in loaded.resolved.items() if key != "runtime"}
        kind = loaded.spec.runtime.distributed
        together.join(fingerprint(__version__, command, kind, shared))
        if not here.is_rank_zero:
            worker.run(loaded, command, together)
    with coordinator.ending_workers(together):
        record = runner.run(loaded, command, together)
    before, after = record.metrics.get("baseline", {}), record.metrics.get("final", {})
    names = [name for name in after if name in MEASURED]  # the others count rows
    log.change({name: (before.get(name), after[name]) for name in names})
    log.info("done", output=loaded.spec.output.uri)


def _require_processes(distributed: str, here: World) -> None:
    if distributed == "none" and not here.is_single:
        raise UsageError(
            "$.runtime.distributed",
            f"is none, and the job is started as one of {here.size} processes",
            fix="write auto, ddp or fsdp2, or start one process",
        )
    if distributed in ("ddp", "fsdp2") and here.is_single:
        raise UsageError(
            "$.runtime.distributed",
            "needs several processes, and the job is started as one",
            value=distributed,
            fix="start `torchrun --nproc-per-node 2 -m job run SPEC`, say, or write auto",
        )
