"""Finds a batch size that fits into memory, before the first step.

Runs the heaviest micro-batches of the whole training forward and backward. If one does not fit,
micro-batches are made smaller, and at one row gradient checkpointing is enabled; the rows of an
optimizer step stay the same.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from job import log
from job.distributed import process_group
from job.engines import gradient_checkpointing
from job.engines.base import Engine
from job.engines.compiling import CompiledBlocks
from job.engines.device import Accelerator, release_memory
from job.engines.free_memory import is_out_of_memory
from job.engines.trainer import attach_gradient
from job.errors import OutOfMemoryError
from job.families.batches import model_inputs, to_device
from job.spec.types import JobSpec, TrainSpec
from job.train.dataset import Collator, EncodedDataset
from job.train.heaviest_batches import heaviest_batches
from job.train.out_of_memory import FIELD

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """The spec's settings that divide the rows of a step into micro-batches."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool

    @classmethod
    def of(cls, train: TrainSpec) -> "BatchSettings":
        return cls(
            per_device_train_batch_size=train.per_device_train_batch_size,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            gradient_checkpointing=train.gradient_checkpointing,
        )

    def smaller(self) -> "BatchSettings | None":
        """The next settings to try, for the same rows with less memory; None if there are none."""
        rows = self.per_device_train_batch_size
        if rows > 1:
            part = max(n for n in range(1, rows // 2 + 1) if rows % n == 0)
            return replace(
                self,
                per_device_train_batch_size=part,
                gradient_accumulation_steps=self.gradient_accumulation_steps * (rows // part),
            )
        if not self.gradient_checkpointing:
            return replace(self, gradient_checkpointing=True)
        return None

    def __str__(self) -> str:
        rows, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        checkpointing = "with" if self.gradient_checkpointing else "without"
        return f"{rows} × {accumulation}, {checkpointing} gradient checkpointing"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Runs trial steps with the model, the rows and the row order of the training."""

    engine: Engine
    model: "PreTrainedModel | PeftModel"
    dataset: EncodedDataset
    collator: Collator
    planned_batches: Callable[[TrainSpec], Iterable[list[int]]]
    """Every micro-batch of this process in the whole training, as row numbers."""
    blocks: CompiledBlocks | None = None

    def fits(self, spec: TrainSpec, settings: BatchSettings) -> bool:
        """Whether the heaviest micro-batches fit."""
        if self.blocks is not None and settings.gradient_checkpointing:
            self.blocks.release()  # compiled blocks do not support gradient checkpointing
        planned = self.planned_batches(replace(spec, **asdict(settings)))
        return all(
            fits(self.model, functools.partial(self._batch, rows), self.engine, settings)
            for rows in heaviest_batches(planned, self.dataset.lengths, self.dataset.patches)
        )

    def _batch(self, rows: Sequence[int]) -> dict[str, Any]:
        batch = self.collator.batch([self.dataset.row(row) for row in rows])
        return to_device(model_inputs(dict(batch)), self.engine.device)


def find_batch_size(
    spec: JobSpec, accelerator: Accelerator, trial: Trial
) -> tuple[JobSpec, dict[str, Any] | None]:
    """The spec with a batch size that fits, and the trial's record for run.json; None if skipped.

    Raises OutOfMemoryError if nothing fits.
    """
    wanted = spec.train.fit == "on" or (spec.train.fit == "auto" and accelerator.kind != "cpu")
    if not wanted or spec.runtime.distributed == "fsdp2":  # it may fit only once it is sharded
        return spec, None
    settings, too_large = first_that_fits(
        BatchSettings.of(spec.train), functools.partial(trial.fits, spec.train)
    )
    if settings is None:
        raise OutOfMemoryError(
            FIELD,
            f"no step fits into the {log.size(accelerator.memory_bytes)} of {accelerator.name}: "
            f"tried {'; '.join(map(str, too_large))}",
            value=spec.train.per_device_train_batch_size,
            fix="lower data.max_pixels or train.max_length",
        )
    log.info("a step fits into memory", tried=settings)
    compiled = spec.train.torch_compile and not settings.gradient_checkpointing
    train = replace(spec.train, **asdict(settings), torch_compile=compiled)
    record = {**asdict(settings), "too_large": [asdict(each) for each in too_large]}
    return replace(spec, train=train), record


def first_that_fits(
    start: BatchSettings, fits: Callable[[BatchSettings], bool]
) -> tuple[BatchSettings | None, list[BatchSettings]]:
    """The first settings, from `start` on, that fit on all processes, or None; and those that were
    too large."""
    settings: BatchSettings | None = start
    too_large: list[BatchSettings] = []
    while settings is not None:
        fitting = fits(settings)
        release_memory()  # the failed step's tensors: its error and frames are gone by now
        if not process_group.any_rank(not fitting):
            return settings, too_large
        too_large.append(settings)
        smaller = settings.smaller()
        log.warn("a step does not fit into memory", tried=settings, next=smaller or "nothing")
        settings = smaller
    return None, too_large


def fits(
    model: "PreTrainedModel | PeftModel",
    make_batch: Callable[[], dict[str, Any]],
    engine: Engine,
    settings: BatchSettings,
) -> bool:
    """Whether the batch can be built, and a forward and backward pass fits into memory.

    No side effects: gradients are dropped, and the random state is restored.
    """
    was_training = model.training
    model.train()
    if settings.gradient_checkpointing:
        gradient_checkpointing.enable(model)
    devices = [engine.device] if engine.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), _autocast(engine):
            attach_gradient(model(**make_batch()).loss, model).backward()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.train(was_training)


def _autocast(engine: Engine) -> AbstractContextManager[object]:
    if not engine.autocast:
        return nullcontext()
    return torch.autocast(engine.device.type, torch.bfloat16)
