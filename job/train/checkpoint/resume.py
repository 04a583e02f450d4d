"""The checkpoint to resume from: chosen by rank 0, fetched once per machine."""

import json
from pathlib import Path

from job import log, storage
from job.errors import MissingInputError
from job.spec.types import TrainSpec
from job.train.checkpoint import state_files
from job.train.checkpoint.contents import KIND, OPTIMIZER
from job.train.checkpoint.storage import CheckpointStore, ContentCheck

EIGHT_BIT, EXACT = "adamw_8bit", "adamw_torch_fused"
"""What `optim: auto` chooses between on a GPU, by whether bitsandbytes is installed."""


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


def optimizer_to_resume(spec: TrainSpec, store: CheckpointStore, found: str) -> str:
    """`found`, the optimizer for this machine, or that of the checkpoint if `auto` found another.

    An environment that got bitsandbytes after the checkpoint was stored would have to discard it.
    Every process has to call it. Raises StorageError if the store is unavailable.
    """
    from job.distributed import process_group

    if spec.optim != "auto" or found != EIGHT_BIT:
        return found
    kind = _stored_kind(spec, store) if process_group.rank() == 0 else None
    if process_group.broadcast(kind) != "AdamW":
        return found
    log.info("the optimizer is that of the checkpoint", optim=EXACT, instead_of=found)
    return EXACT


def _stored_kind(spec: TrainSpec, store: CheckpointStore) -> object:
    """The class of the optimizer of the checkpoint that will be tried first; None if unknown."""
    uri = spec.resume_from_checkpoint
    if uri == "auto":
        step = store.newest()
        uri = "never" if step is None else store.at(step)
    if uri == "never":
        return None
    try:
        text = storage.read_text(storage.join(uri, f"{OPTIMIZER}.json"))
        return state_files.value_of(text, KIND)
    except (MissingInputError, ValueError):  # reported when the checkpoint is fetched
        return None


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
