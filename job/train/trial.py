"""Trial steps before the first step: whether a micro-batch fits into memory.

The memory estimate answers first: a trial of a large model takes a second or more.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.exc import TorchDynamoException

from job import log
from job.distributed import process_group
from job.engines import gradient_checkpointing, memory
from job.engines.base import Engine
from job.engines.compiling import CompiledBlocks
from job.engines.device import Accelerator, release_memory
from job.engines.free_memory import is_out_of_memory
from job.engines.memory import OPTIMIZER_STATE_BYTES, MemoryEstimate
from job.engines.trainer import attach_gradient
from job.engines.ways import ATTENTION
from job.families.batches import model_inputs, to_device
from job.families.encoded import RowSize
from job.spec.types import TrainSpec
from job.train.dataset import Collator, EncodedDataset
from job.train.heaviest_batches import heaviest_batches
from job.train.pass_candidates import BatchSettings
from job.train.train_context import TrainContext
from job.train.training_rows import TrainingRows, encode_truncated

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PassMemory = Callable[[TrainSpec, Sequence[int]], MemoryEstimate | None]
"""Estimates the memory of a pass over these rows; None if it is unknown."""
SPARE = 0.03
"""Share of a GPU's memory that passes larger than the spec's leave free: allocators
fragment, and captured passes are padded."""
WEIGHED_PASSES = 256
"""Passes at the start of the training whose mean size stands for all."""


@dataclass(kw_only=True)
class Trial:
    """Runs trial steps with the model, the rows and the row order of the training."""

    engine: Engine
    model: "PreTrainedModel | PeftModel"
    dataset: EncodedDataset
    collator: Collator
    planned_batches: Callable[[TrainSpec], Iterable[list[int]]]
    """Every micro-batch of this process in the whole training, as row numbers."""
    estimate: PassMemory
    optim: str
    """The optimizer, whose states do not exist yet."""
    padding_free: bool = True
    captured: bool = False
    """Whether passes can be captured as graphs."""
    blocks: CompiledBlocks | None = None
    """The model's compiled blocks; None once they are released."""
    ruled_out: list[BatchSettings] = field(default_factory=list)
    """What the estimate ruled out in this process, without a trial."""

    def pass_tokens(self, spec: TrainSpec, settings: BatchSettings) -> float:
        """The mean tokens of a pass, padding included."""
        lengths = self.dataset.lengths
        batches = itertools.islice(self._planned(spec, settings), WEIGHED_PASSES)
        sizes = [[lengths[max(row, 0)] for row in rows] for rows in batches]
        return fmean(sum(each) if self.padding_free else len(each) * max(each) for each in sizes)

    def is_ruled_out(
        self, spec: TrainSpec, settings: BatchSettings, accelerator: Accelerator
    ) -> bool:
        """Whether even the first pass, which the heaviest exceeds, takes far too much memory."""
        first = next(iter(self._planned(spec, settings)))
        estimate = self.estimate(settings.of_spec(spec), first)
        if estimate is None or not estimate.is_ruled_out(accelerator.memory_bytes):
            return False
        self.ruled_out.append(settings)
        return True

    def is_safe(self, spec: TrainSpec, settings: BatchSettings, accelerator: Accelerator) -> bool:
        """Whether the heaviest passes leave ample memory by the estimate, without a trial."""
        estimates = [
            self.estimate(settings.of_spec(spec), rows) for rows in self._heaviest(spec, settings)
        ]
        most = accelerator.memory_bytes
        return all(each is not None and each.is_safe(most) for each in estimates)

    def fits(self, spec: TrainSpec, settings: BatchSettings) -> bool:
        """Whether the heaviest micro-batches fit.

        Releases compiled blocks for gradient checkpointing, which they do not support, and if they
        fail to compile, unless the spec insists on them.
        """
        if settings.gradient_checkpointing:
            self.release_blocks()
        heaviest = self._heaviest(spec, settings)
        try:
            return self._all_fit(heaviest, spec, settings)
        except TorchDynamoException as error:
            if self.blocks is None or spec.torch_compile is True:
                raise
            reason = str(error).partition("\n")[0]
            log.warn("blocks run uncompiled: compiling them failed", reason=reason)
        self.release_blocks()
        release_memory()
        return self._all_fit(heaviest, spec, settings)

    def release_blocks(self) -> None:
        """Makes compiled blocks run eagerly."""
        if self.blocks is not None:
            self.blocks.release()
            self.blocks = None

    def _planned(self, spec: TrainSpec, settings: BatchSettings) -> Iterable[list[int]]:
        return self.planned_batches(settings.of_spec(spec))

    def _heaviest(self, spec: TrainSpec, settings: BatchSettings) -> list[list[int]]:
        planned = self._planned(spec, settings)
        return heaviest_batches(planned, self.dataset.lengths, self.dataset.patches)

    def _all_fit(
        self, batches: Sequence[Sequence[int]], spec: TrainSpec, settings: BatchSettings
    ) -> bool:
        reserved = self._reserved(spec, settings)
        return all(
            fits(self.model, functools.partial(self._batch, rows), self.engine, settings, reserved)
            for rows in batches
        )

    def _reserved(self, spec: TrainSpec, settings: BatchSettings) -> int:
        """Bytes that a step of the training takes on a GPU beyond those of a trial: optimizer
        states, gradients that are there before a pass, DDP's buckets."""
        device = self.engine.device
        if device.type != "cuda":
            return 0
        trained = [each for each in self.model.parameters() if each.requires_grad]
        gradients = sum(each.numel() * each.element_size() for each in trained)
        before = settings.gradient_accumulation_steps > 1 or self.captured
        copies = before + (process_group.size() > 1)
        states = sum(each.numel() for each in trained) * OPTIMIZER_STATE_BYTES.get(self.optim, 8)
        larger = settings.per_device_train_batch_size > spec.per_device_train_batch_size
        memory = torch.cuda.get_device_properties(device).total_memory
        return gradients * copies + states + (int(SPARE * memory) if larger else 0)

    def _batch(self, rows: Sequence[int]) -> dict[str, Any]:
        batch = self.collator.batch([self.dataset.row(row) for row in rows])
        return to_device(model_inputs(dict(batch)), self.engine.device)


def pass_memory(context: TrainContext, rows: TrainingRows) -> PassMemory:
    """Estimates as the plan does, but with the training's own rows; no image is decoded."""
    family, spec = context.family, context.spec
    encode = functools.partial(encode_truncated, family=family, spec=spec)
    dataset = EncodedDataset(rows.measured, rows.filtered, encode)

    @functools.cache
    def size(row: int) -> RowSize:
        return family.row_size(dataset.row(row))

    @functools.cache
    def skeleton() -> "PreTrainedModel":
        return family.meta_model()

    tried = context.ways.of(ATTENTION)
    varlen = None if tried is None else tried.taken

    def estimate(train: TrainSpec, batch: Sequence[int]) -> MemoryEstimate | None:
        sizes = [size(max(row, 0)) for row in batch]  # a dummy row is a copy of the first
        changed = replace(spec, train=train)
        return memory.estimate(
            type(family), skeleton(), changed, sizes, context.accelerator, varlen=varlen
        )

    return estimate


def fits(
    model: "PreTrainedModel | PeftModel",
    make_batch: Callable[[], dict[str, Any]],
    engine: Engine,
    settings: BatchSettings,
    reserved: int = 0,
) -> bool:
    """Whether the batch can be built, and a forward and backward pass fits into memory, with
    `reserved` bytes of the device occupied.

    No side effects: gradients are dropped, and the random state is restored.
    """
    was_training = model.training
    model.train()
    if settings.gradient_checkpointing:
        gradient_checkpointing.enable(model)
    devices = [engine.device] if engine.device.type == "cuda" else []
    try:
        occupied = torch.empty(reserved, dtype=torch.uint8, device=engine.device)
        with torch.random.fork_rng(devices=devices), _autocast(engine):
            attach_gradient(model(**make_batch()).loss, model).backward()
        del occupied
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
