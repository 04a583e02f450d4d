"""Validation during training: the loss, and metrics of generated answers, on rows of their own.

A validation leaves the training as it was: weights, random states, modes and token counts. Batches
are those of training (packed or padded), without gradients, and in evaluation mode, so without
dropout. The loss is the mean over the supervised tokens of all rows, without auxiliary losses.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from job import log, signals
from job.distributed import process_group
from job.engines import sharding
from job.engines.compiling import CompiledBlocks
from job.engines.device import release_memory
from job.engines.free_memory import is_out_of_memory
from job.families.batches import Batch, MicroBatch
from job.families.held_out_loss import (
    LOSS_TOKENS,
    SummedLoss,
    loss_evaluation,
    rows_of_a_batch,
)
from job.families.load_balancing import without_aux_loss
from job.train.adapting import AdaptedModel
from job.train.checkpoint import random_state
from job.train.dataset import Collator, DummyRow
from job.train.out_of_memory import raise_if_validation_does_not_fit
from job.train.outputs import autocast_removed
from job.train.sampler import DUMMY_ROW
from job.train.train_context import TrainContext
from job.train.validation_rows import ValidationRows

if TYPE_CHECKING:
    import torch

LEAST_TOKENS = 512
"""Fewer than these are not worth a try: batches have `per_device_eval_batch_size` rows."""
CACHED_BYTES = 256 * 2**20
"""How much of a process's batches is kept in memory from one validation to the next."""


class _Interrupted(Exception):
    """A process was asked to stop."""


class _DoesNotFit(Exception):
    """A batch of several rows ran out of memory in some process."""


@dataclass(frozen=True, kw_only=True)
class ValidationResult:
    metrics: dict[str, float]
    """With the prefix `eval_`, equal in all processes."""
    seconds: float


class Validator:
    """Measures a model on the validation rows; all processes have to take part."""

    def __init__(
        self,
        context: TrainContext,
        rows: ValidationRows,
        adapted: AdaptedModel,
        blocks: CompiledBlocks | None,
    ) -> None:
        """`blocks` are the model's compiled blocks, if any."""
        self._context, self._rows, self._adapted, self._blocks = context, rows, adapted, blocks
        self._collator = Collator(context.family, padding_free=adapted.padding_free)
        self._batch_size = rows_of_a_batch(context.spec.train.per_device_eval_batch_size)
        # A process that shards the model must not run out of memory between two collectives.
        large = adapted.padding_free and context.engine.device.type != "cpu"
        sharded = context.spec.shards_weights
        self._tokens = LOSS_TOKENS if large and not sharded else 0
        self._sharded = sharded
        self._cached: dict[tuple[int, ...], MicroBatch] = {}
        self._cached_bytes = 0
        self.seconds = 0.0
        """Of all validations in this process so far."""

    @property
    def rows(self) -> ValidationRows:
        return self._rows

    def __call__(self, model: "torch.nn.Module") -> ValidationResult | None:
        """The metrics; None if any process was asked to stop, which ends the validation.

        Raises OutOfMemoryError if a batch does not fit.
        """
        started = time.monotonic()
        try:
            with self._undisturbed(model):
                metrics = {"eval_loss": self._loss(model)}
                if self._context.answer_metrics is not None:
                    metrics |= self._answer_metrics(model)
        except _Interrupted:
            return None
        except (RuntimeError, MemoryError) as error:
            context = self._context
            raise_if_validation_does_not_fit(error, context.spec.train, context.accelerator)
            raise
        finally:
            seconds = time.monotonic() - started
            self.seconds += seconds
        if not math.isfinite(metrics["eval_loss"]) and process_group.rank() == 0:
            log.warn(
                "the validation loss is not finite: the training has probably diverged",
                eval_loss=metrics["eval_loss"],
                fix="lower train.learning_rate, or raise train.warmup_steps",
            )
        return ValidationResult(metrics=metrics, seconds=seconds)

    @contextmanager
    def _undisturbed(self, model: "torch.nn.Module") -> Iterator[None]:
        """A context for evaluation, after which the training finds everything as it was."""
        import torch

        modes = [(module, module.training) for module in model.modules()]
        random = random_state.capture()
        eager = nullcontext() if self._blocks is None else self._blocks.eager()
        try:
            # With the routers' loss, Transformers' own generation fails.
            with torch.no_grad(), without_aux_loss(self._adapted.base), eager:
                yield
        finally:
            for module, training in modes:
                module.training = training
            if sharding.is_sharded(model):
                sharding.reshard(model)
            random_state.restore(random)

    # --- loss --------------------------------------------------------------------------------

    def _loss(self, model: "torch.nn.Module") -> float:
        while True:
            try:
                with loss_evaluation(model, self._adapted.base):
                    return self._loss_of_batches(model)
            except _DoesNotFit:
                if self._tokens:
                    self._tokens = self._tokens // 2 if self._tokens > LEAST_TOKENS else 0
                else:
                    self._batch_size //= 2
                self._cached.clear()
                self._cached_bytes = 0
                release_memory()
                log.info(
                    "validation batches are made smaller to fit",
                    tokens=self._tokens,
                    rows=self._batch_size,
                )

    def _loss_of_batches(self, model: "torch.nn.Module") -> float:
        packed, device = self._adapted.padding_free, self._context.engine.device
        total = SummedLoss(model, device, packed=packed)
        for rows in self._rows.batches(self._batch_size, self._tokens):
            self._check_stop()
            batch = self._batch(rows)
            with self._smaller_if_it_does_not_fit():
                total.add(cast(Batch, batch), batch["counted_tokens"])  # 0 of a dummy row
        self._check_stop()
        sums = process_group.all_gather((total.nll, total.supervised))
        return sum(own for own, _ in sums) / sum(count for _, count in sums)

    @contextmanager
    def _smaller_if_it_does_not_fit(self) -> Iterator[None]:
        """Raises _DoesNotFit in all processes if a batch that can be made smaller runs out of
        memory in any of them."""
        can_shrink = not self._sharded and (self._tokens > 0 or self._batch_size > 1)
        too_large = False
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not can_shrink or not is_out_of_memory(error):
                raise
            too_large = True
        if can_shrink and process_group.any_rank(too_large):
            raise _DoesNotFit

    def _batch(self, rows: list[int]) -> MicroBatch:
        key = tuple(rows)
        if key in self._cached:
            return self._cached[key]
        dataset = self._rows.dataset
        batch = self._collator.batch(
            [DummyRow(dataset.row(0)) if row == DUMMY_ROW else dataset.row(row) for row in rows]
        )
        size = sum(getattr(value, "nbytes", 0) for value in batch.values())
        if self._cached_bytes + size <= CACHED_BYTES:
            self._cached[key] = batch
            self._cached_bytes += size
        return batch

    # --- answers -----------------------------------------------------------------------------

    def _answer_metrics(self, model: "torch.nn.Module") -> dict[str, float]:
        """Every process answers its share of the rows; all score all answers."""
        answers = self._context.answer_metrics
        assert answers is not None
        model.eval()
        own = self._rows.of_rank(process_group.rank())
        with autocast_removed(model):
            texts = answers.generate(model, own, _asked_to_stop)
        self._check_stop()
        gathered = process_group.all_gather(texts)
        rows = [row for rank in range(process_group.size()) for row in self._rows.of_rank(rank)]
        scores = answers.score(rows, [text for texts in gathered for text in texts])
        return {f"eval_{name}": float(value) for name, value in scores.items()}

    # --- ends --------------------------------------------------------------------------------

    def _check_stop(self) -> None:
        if process_group.any_rank(_asked_to_stop()):
            raise _Interrupted


def _asked_to_stop() -> bool:
    return signals.received() is not None
