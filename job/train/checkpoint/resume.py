"""The checkpoint to resume from: chosen by rank 0, fetched once per machine."""

import json
from pathlib import Path

from job import log
from job.spec.types import TrainSpec
from job.train.checkpoint.storage import CheckpointStore, ContentCheck


def resume_point(
    spec: TrainSpec, store: CheckpointStore, scratch: Path, check: ContentCheck
) -> Path | None:
    """The local copy of the checkpoint to resume from; None to start from the beginning.

    Rank 0 chooses for all ranks: the newest checkpoint whose content passes `check`, or the one
    that the spec names. Raises InputError if that one cannot be used.
    """
    from job.distributed import process_group

    uri = None
    if process_group.rank() == 0:
        uri = _choose(spec, store, scratch / "resume", check)
    uri = process_group.broadcast(uri)
    if uri is None:
        return None
    fetched = scratch / "resume"
    if process_group.is_local_rank_zero() and process_group.rank() > 0:
        store.fetch(uri, fetched)
    process_group.barrier()
    state = json.loads((fetched / "trainer_state.json").read_text())
    named = fetched.with_name(f"checkpoint-{state['global_step']}")
    process_group.barrier()
    if process_group.is_local_rank_zero():
        fetched.rename(named)
    process_group.barrier()
    log.info("resuming", step=state["global_step"])
    return named


def _choose(
    spec: TrainSpec, store: CheckpointStore, directory: Path, check: ContentCheck
) -> str | None:
    """Fetches the checkpoint to resume from into `directory`; returns its URI."""
    if spec.resume_from_checkpoint == "never":
        return None
    if spec.resume_from_checkpoint != "auto":
        store.fetch(spec.resume_from_checkpoint, directory, check)
        return spec.resume_from_checkpoint
    return store.latest(directory, check)


def step_of(resumed: Path | None) -> int:
    return int(resumed.name.rpartition("-")[2]) if resumed else 0
