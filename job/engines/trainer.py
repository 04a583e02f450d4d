"""The training step, top to bottom: from fetching its micro-batches to logging it.

`StepTrainer` subclasses Transformers' `Trainer`, which still builds the optimizer and scheduler,
wraps the model (autocast, DDP or FSDP2), restores checkpoints and ends the loop. Everything in
between is here, in the order of a step:

    _run_epoch            the optimizer steps of an epoch; after a resume, skips finished ones
      train_step          fetch → forward and backward → clip → optimizer → scheduler → log
        _fetch            the step's micro-batches from the loader; `DataTimer` measures the wait
        CapturedSteps.forward_backward  once per micro-batch, if passes are captured; otherwise:
        training_step     once per micro-batch, inherited from Transformers:
          _prepare_inputs     moves the micro-batch to the device
          compute_loss        forward, and the micro-batch's share of the step's loss
                              (the backward pass follows, through Accelerate)
        _maybe_log_save_evaluate   inherited; calls the callbacks in `job.train.callbacks`, and
                                   validates (`job.train.validating_trainer`)

Elsewhere: `job.train.sampler` and `job.train.micro_batches` divide rows into micro-batches;
`job.train.dataset` and the family's `pack` or `collate` turn rows into tensors; the family's packed
model is the forward pass; `job.families.supervised_logits` computes logits of supervised tokens
only.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from accelerate import skip_first_batches
from accelerate.data_loader import DataLoaderShard
from transformers import Trainer

from job.distributed import process_group
from job.engines import eight_bit_optimizer, gradient_checkpointing, sharding
from job.engines.captured_steps import CapturedSteps
from job.engines.data_timer import DataTimer
from job.engines.parameter_groups import LearningRates, parameter_groups, rates_by_group
from job.engines.unread import UnreadWeights
from job.families.batches import MicroBatch, host_keys, model_inputs
from job.families.four_bit.tensor import FourBitTensor
from job.families.vision_tower import vision_tower_pattern

if TYPE_CHECKING:
    import torch
    from transformers import TrainerControl


RATE_PREFIX = "learning_rate/"
"""Prefix of the learning rates of parameter groups among the logged values."""


def attach_gradient(
    loss: "torch.Tensor", model: "torch.nn.Module", *, all_weights: bool = False
) -> "torch.Tensor":
    """Connects a loss () that depends on no trained weight to all of them, with zero gradients.

    This happens if only the vision tower is trained and a micro-batch has no image. DDP reduces
    gradients across processes, so no process may skip a backward pass. With `all_weights`, a loss
    that depends on some is connected too: optimizers skip weights without a gradient.
    """
    if loss.requires_grad and not all_weights:
        return loss
    return loss + 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)


def keep_packed_from_ddp(model: "torch.nn.Module") -> None:
    """Makes DDP leave weights in 4 bits alone, which it would copy from the first process.

    They cannot be written, and need not be: each process packs the same weights in the same way.
    """
    from torch.nn.parallel import DistributedDataParallel

    packed = [name for name, each in model.named_parameters() if isinstance(each, FourBitTensor)]
    if packed:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, packed)


class StepTrainer(Trainer):
    """Transformers' `Trainer` with this project's batches, loss and step.

    The loss of an optimizer step is the mean over its supervised tokens, however they are divided
    among micro-batches and processes.
    """

    control: "TrainerControl"
    """What the callbacks request: log, save, stop."""
    optimizer: Any
    """Transformers', wrapped by Accelerate during the training; None before."""

    def __init__(
        self,
        *args: object,
        batch_sampler: Iterable[list[int]],
        data_timer: DataTimer,
        learning_rates: LearningRates | None = None,
        captured: CapturedSteps | None = None,
        sharded_autocast: bool = False,
        unread: UnreadWeights | None = None,
        **kwargs: object,
    ) -> None:
        """`batch_sampler` yields the row numbers of each of this process's micro-batches.

        `learning_rates` is None if all weights have the same. `captured` runs the forward and
        backward passes instead of `training_step`, if given. `sharded_autocast` makes a sharded
        model compute in bf16, as `args.bf16` does others. `unread` are the weights of a model that
        is sharded before they are read.
        """
        self._captured, self._sharded_autocast = captured, sharded_autocast
        self._unread = unread
        self._reduces_each_pass = self._drops_unused = False
        super().__init__(*args, **kwargs)
        self._batch_sampler, self._data_timer = batch_sampler, data_timer
        self._learning_rates = learning_rates
        self._rates_of_step: dict[str, float] = {}
        # `compute_loss` weights micro-batches; without this, Transformers would divide the loss by
        # their number again.
        self.model_accepts_loss_kwargs = True

    # Before the first step.

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.args.device.type == "cpu":
            sharding.use_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True
        if self._captured is not None:
            # Without DDP, whose hooks would be captured too: `train_step` averages the gradients.
            self.accelerator.prepare_model = functools.partial(
                self.accelerator.prepare_model, evaluation_mode=True
            )

    def get_train_dataloader(self) -> DataLoaderShard:
        """The loader; copies of batches to the device overlap with compute."""
        import torch

        args = self.args
        return DataLoaderShard(
            self.train_dataset,
            device=args.device,
            batch_sampler=self._batch_sampler,
            # Each iterator draws seeds for its workers. Drawn from the global generator, they would
            # make dropout depend on the number of workers and resumes.
            generator=torch.Generator().manual_seed(args.seed),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory,
            _non_blocking=True,
        )

    def create_optimizer(self, model: "torch.nn.Module | None" = None) -> "torch.optim.Optimizer":
        """Transformers' optimizer, with a parameter group for each learning rate."""
        trained = self.model if model is None else model
        if self.optimizer is None and self._learning_rates is not None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = parameter_groups(
                trained,
                self._learning_rates,
                weight_decay=self.args.weight_decay,
                decayed=frozenset(self.get_decay_parameter_names(trained)),
            )
            # Transformers takes `params` as the groups.
            self.optimizer_cls_and_kwargs = kind, {**settings, "params": groups}
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        eight_bit_optimizer.avoid_syncs(optimizer)
        return optimizer

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoaderShard, resume_from_checkpoint: str | None
    ) -> "tuple[torch.nn.Module, DataLoaderShard]":
        keep_packed_from_ddp(self.model)
        prepared: AbstractContextManager[None] = nullcontext()
        if self._unread is not None:
            self._unread.shard(self.accelerator, self.model)
            self._unread = None
            self.optimizer = None  # that of the placeholders, if a checkpoint was compared with it
            prepared = sharding.optimizer_kept(self.accelerator, self.create_optimizer())
        elif self.is_fsdp_enabled:
            prepared = sharding.whole_weights_freed(self.model)
        with prepared:
            model, loader = super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        if self.args.gradient_checkpointing:
            gradient_checkpointing.skip_frozen_inputs(self.model)
        if sharding.is_sharded(model):
            sharding.allow_unused_parameters(model)
            # Gradients that wait for the last micro-batch are whole: as large as the model.
            self._reduces_each_pass = all(each.requires_grad for each in model.parameters())
            reads_images = vision_tower_pattern(self.model) is not None
            self._drops_unused = self._reduces_each_pass and reads_images
            if self._sharded_autocast:
                sharding.autocast_forward(model, self.args.device)
        return model, loader

    # An epoch, step by step.

    def _run_epoch(
        self,
        model: "torch.nn.Module",
        epoch: int,
        train_dataloader: DataLoaderShard,
        steps_in_epoch: int,
        start_time: float,
        resume_from_checkpoint: str | None,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
        **_: object,
    ) -> None:
        """Trains the steps of an epoch.

        In Transformers' argument names, a step "in epoch" is a micro-batch. After a resume, the
        random state is restored only once batches are fetched, because fetching may draw numbers.
        """
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            # Resumed at the last step, or where training stopped early: Transformers would train
            # one more before it checks.
            self.control.should_training_stop = True
            return
        finished, rng_checkpoint = 0, None  # micro-batches; the checkpoint to restore from
        if epoch == epochs_trained and resume_from_checkpoint is not None:
            finished = steps_trained_in_current_epoch
            if finished:
                train_dataloader = skip_first_batches(train_dataloader, finished)
                rng_checkpoint = resume_from_checkpoint
            else:
                self._load_rng_state(resume_from_checkpoint)
        if self._captured is not None:
            model.train()
            self._captured.start()
        train_dataloader.set_epoch(epoch)
        loader = iter(train_dataloader)
        accumulation = self.args.gradient_accumulation_steps
        for start in range(finished, steps_in_epoch, accumulation):
            end = min(start + accumulation, steps_in_epoch)
            self.train_step(
                model,
                loader,
                micro_batches=end - start,
                epoch=epoch + end / steps_in_epoch,
                start_time=start_time,
                rng_checkpoint=rng_checkpoint,
            )
            rng_checkpoint = None
            if self.control.should_training_stop:
                break
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)

    def train_step(
        self,
        model: "torch.nn.Module",
        loader: Iterator[MicroBatch],
        *,
        micro_batches: int,
        epoch: float,
        start_time: float,
        rng_checkpoint: str | None = None,
    ) -> None:
        """One optimizer step over the next `micro_batches` of this process.

        `epoch` is the fractional epoch at the end of the step. `rng_checkpoint` is the checkpoint
        whose random state is restored before the forward passes: only in the first step after a
        resume.
        """
        # Fetch. Token counts are summed over micro-batches and processes.
        batches = self._fetch(loader, micro_batches)
        if rng_checkpoint is not None:
            self._load_rng_state(rng_checkpoint)
        local_supervised = sum(batch["counted_tokens"] for batch in batches)
        local_tokens = sum(batch["tokens"] for batch in batches)
        local_images = sum(batch["images"] for batch in batches)
        supervised, tokens, images = process_group.all_reduce_sum(
            [local_supervised, local_tokens, local_images]
        )
        self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)

        # Forward and backward. Gradients accumulate locally; the last backward all-reduces them,
        # or each one if all weights are sharded.
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            # (): this micro-batch's share of the step's loss. Stays on the device: no sync.
            if self._captured is not None:
                loss = self._captured.forward_backward(batch, self._share(batch, supervised))
            else:
                reduces = is_last or self._reduces_each_pass
                with nullcontext() if reduces else self.accelerator.no_sync(model):
                    loss = self.training_step(model, batch, supervised)
            self._tr_loss += loss
        if self._captured is not None:
            self._captured.finish_step(images)
        elif self._drops_unused and not images:
            sharding.drop_zero_gradients(model)
        self.state.num_input_tokens_seen += tokens

        # Clip; if max_grad_norm is 0, only measure the norm.
        clips = self.args.max_grad_norm > 0
        grad_norm = self._get_grad_norm(model, self._clip_grad_norm(model) if clips else None)

        # Optimizer, then scheduler. Log the learning rate that this step used, not the next one.
        self.control = self.callback_handler.on_pre_optimizer_step(
            self.args, self.state, self.control
        )
        self.optimizer.step()
        self.control = self.callback_handler.on_optimizer_step(self.args, self.state, self.control)
        learning_rate = self._get_learning_rate()
        self._rates_of_step = rates_by_group(self.optimizer)
        self.lr_scheduler.step()
        if self._captured is not None:
            self._captured.zero()
        else:
            model.zero_grad()

        # Callbacks decide whether to log, save and stop; Transformers then logs and saves.
        self.state.global_step += 1
        self.state.epoch = epoch
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        self._maybe_log_save_evaluate(
            self._tr_loss,
            grad_norm,
            model,
            trial=None,
            epoch=epoch,
            ignore_keys_for_eval=None,
            start_time=start_time,
            learning_rate=learning_rate,
        )

    # Parts of a step.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the learning rate of each group to those of a step, as `learning_rate/GROUP`."""
        if "learning_rate" in logs:
            logs |= {f"{RATE_PREFIX}{name}": r for name, r in self._rates_of_step.items()}
        super().log(logs, start_time)

    def _fetch(self, loader: Iterator[MicroBatch], count: int) -> list[MicroBatch]:
        """The next `count` micro-batches. Raises the error of one that could not be built."""
        batches = list(itertools.islice(self._data_timer.timed(loader), count))
        for batch in batches:
            if "failed" in batch:
                raise batch["failed"]
        return batches

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        """Moves the micro-batch to the device, except for `host_keys`."""
        prepared = super()._prepare_inputs(inputs)
        # The loader has moved everything. One copy back; reading values one by one on the device
        # would sync for each.
        host = host_keys(prepared)
        return {k: v.cpu() if k in host else v for k, v in prepared.items()}  # type: ignore[return-value]

    def compute_loss(
        self,
        model: "torch.nn.Module",
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> "torch.Tensor":
        """Forward; returns the micro-batch's share () of the step's loss.

        The model's loss is the mean over the micro-batch's supervised tokens. It is weighted by
        their fraction of `num_items_in_batch`: the step's supervised tokens over all processes.
        """
        assert num_items_in_batch is not None
        assert not return_outputs
        loss = attach_gradient(model(**model_inputs(dict(inputs))).loss, model)
        return loss * self._share(inputs, num_items_in_batch)

    def _share(self, batch: MicroBatch, supervised: int) -> float:
        """The factor of a micro-batch's mean loss in the step's, of `supervised` tokens in all."""
        # Times the number of processes: gradients are averaged over them, but a sum is needed.
        return batch["counted_tokens"] * self.accelerator.num_processes / supervised
