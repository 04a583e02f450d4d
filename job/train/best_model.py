"""Gives the model in memory the weights of the best validation, after the last step."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from job import log
from job.distributed import process_group
from job.engines import sharding
from job.errors import SpecError, StorageError
from job.spec.types import JobSpec
from job.train.checkpoint import shard_files
from job.train.checkpoint.contents import stores_shards, weights_file, weights_problem
from job.train.checkpoint.storage import CheckpointStore
from job.train.selection import Measured, Selection

if TYPE_CHECKING:
    import torch

    from job.train.validating_trainer import ValidatingTrainer


class Trained(Protocol):
    """What `load_best` reads of a training that has ended."""

    @property
    def spec(self) -> JobSpec: ...
    @property
    def trainer(self) -> "ValidatingTrainer": ...
    @property
    def selection(self) -> Selection | None: ...
    @property
    def checkpoints(self) -> CheckpointStore: ...


def load_best(session: Trained, scratch: Path, section: str = "train") -> int:
    """Loads the best step's weights, if the spec wants them; returns the step of the weights.

    `section` is the section of the spec that wants them. All processes have to call it. Raises
    StorageError if the checkpoint is missing or damaged, and SpecError if no validation gave a
    finite value: the last model is never taken instead.
    """
    trainer, selection = session.trainer, session.selection
    last = int(trainer.state.global_step)
    if selection is None or not session.spec.train.load_best_model_at_end:
        return last
    validations = selection.validations(trainer.state.log_history)
    if not validations:
        log.warn("the last step's model is kept: nothing was validated since the resume", step=last)
        return last
    best = selection.best(trainer.state.log_history)
    if best is None:
        raise SpecError(
            f"$.{section}.load_best_model_at_end",
            f"no validation gave a finite {selection.metric}, so no model is the best: the "
            "training has diverged",
            value=True,
            fix=f"lower {section}.learning_rate; to look at the last step's model, set it to false",
        )
    if best.step != last:
        _load(session, best, scratch / "best", section)
    if process_group.rank() == 0:
        _warn_if_all_equal(selection.metric, validations, section)
        at_last = next((each.value for each in validations if each.step == last), None)
        log.info(
            "the best model is kept",
            step=best.step,
            **{selection.metric: best.value},
            last_step=last,
            **({} if at_last is None else {"last": at_last}),
        )
    return best.step


def _warn_if_all_equal(metric: str, validations: Sequence[Measured], section: str) -> None:
    """Then the metric has chosen nothing: of equal values the first is kept, the least trained."""
    if len(validations) > 1 and len({each.value for each in validations}) == 1:
        log.warn(
            f"{metric} is the same in all validations, so it says nothing about the best step, and "
            "the first is kept",
            validations=len(validations),
            value=validations[0].value,
            fix="to keep the last step's model, which trains nothing again, set "
            f"{section}.load_best_model_at_end: false; to choose by another metric, set "
            f"{section}.metric_for_best_model: eval_loss, which trains from the start",
        )


def _load(session: Trained, best: Measured, directory: Path, section: str) -> None:
    """Loads the weights of the best step's checkpoint.

    Of a fully fine-tuned, sharded model, every process reads its shards; else rank 0 reads the
    weights, and gives every process its shard if the model is sharded.
    """
    trainer = session.trainer
    model = trainer.model
    in_shards = stores_shards(trainer)
    follows = process_group.rank() > 0
    if not follows or (in_shards and process_group.is_local_rank_zero()):
        part = weights_file(trainer)
        problem = session.checkpoints.fetch_part(best.step, part, directory, verified=follows)
        problem = problem or weights_problem(directory, trainer)
        if problem is not None:
            raise StorageError(
                session.checkpoints.at(best.step),
                f"the checkpoint of the best model cannot be used: {problem}",
                fix="to keep the last step's model, set "
                f"{section}.load_best_model_at_end: false; to train again, set "
                "train.resume_from_checkpoint: never",
            )
    if in_shards:
        process_group.barrier()
        shard_files.load_weights(model, directory)
        process_group.barrier()
        return
    state: dict[str, torch.Tensor] = {}
    if not follows:
        if sharding.is_sharded(model):
            state = trainer.trained_state_of(directory)
        else:
            trainer.load_trained(directory)
    if sharding.is_sharded(model):
        sharding.load_trained_state(model, state)
