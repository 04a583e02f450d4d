"""The checkpoint that a training goes on from: chosen by rank 0, fetched once on each machine."""

import json
from pathlib import Path

from job import log
from job.spec.types import TrainSpec
from job.train.checkpoint.storage import Check, CheckpointStore


def resume_point(
    spec: TrainSpec, store: CheckpointStore, scratch: Path, check: Check
) -> Path | None:
    """The checkpoint to go on from, fetched once on every machine; None to start anew.

    Rank 0 chooses it, for all: the newest whose content passes the `check`, or the one that the
    spec names. Raises InputError if that one cannot be used.
    """
    from job.distributed import process_group

    uri = None
    if process_group.rank() == 0:
        uri = _checkpoint_to_take(spec, store, scratch / "resume", check)
    uri = process_group.broadcast(uri)
    if uri is None:
        return None
    found = scratch / "resume"
    if process_group.is_local_rank_zero() and process_group.rank() > 0:
        store.fetch(uri, found)
    process_group.barrier()
    state = json.loads((found / "trainer_state.json").read_text())
    named = found.with_name(f"checkpoint-{state['global_step']}")
    process_group.barrier()
    if process_group.is_local_rank_zero():
        found.rename(named)
    process_group.barrier()
    log.info("resuming", step=state["global_step"])
    return named


def _checkpoint_to_take(
    spec: TrainSpec, store: CheckpointStore, directory: Path, check: Check
) -> str | None:
    """The URI of the checkpoint to go on from, which is fetched into `directory`."""
    if spec.resume_from_checkpoint == "never":
        return None
    if spec.resume_from_checkpoint != "auto":
        store.fetch(spec.resume_from_checkpoint, directory, check)
        return spec.resume_from_checkpoint
    return store.latest(directory, check)


def step_of(resumed: Path | None) -> int:
    return int(resumed.name.rpartition("-")[2]) if resumed else 0
