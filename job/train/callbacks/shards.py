"""Stores the shards of checkpoints that processes on other machines than rank 0's have written."""

import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from job.distributed import process_group
from job.storage.digests import FileDigest
from job.train.checkpoint.storage import CheckpointStore


class ShardsCallback(TrainerCallback):
    """On each machine but rank 0's, uploads what its processes have written of a checkpoint.

    Every process needs one, and rank 0 calls it before `CheckpointCallback`, which uploads the
    files of its own machine in the background, and then the manifest. Training waits for the other
    machines. `check_lease` is called on rank 0, which holds the lease.
    """

    def __init__(self, store: CheckpointStore, check_lease: Callable[[], None]) -> None:
        self._store, self._check_lease = store, check_lease
        self._uploads = process_group.is_local_rank_zero() and process_group.rank() > 0
        self._needed = process_group.any_rank(self._uploads)
        self.stored: tuple[FileDigest, ...] = ()
        """The files of other machines that are stored of the newest checkpoint."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if not self._needed:
            return
        assert args.output_dir is not None
        step = state.global_step
        if process_group.rank() == 0:
            self._check_lease()
            self._store.begin(step)
        process_group.barrier()
        own: tuple[FileDigest, ...] = ()
        if self._uploads:
            directory = Path(args.output_dir, f"checkpoint-{step}")
            own = self._store.save_part(directory, step)
            shutil.rmtree(directory, ignore_errors=True)
        self.stored = tuple(file for each in process_group.all_gather(own) for file in each)
