"""The `Trainer` of the plain engine."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from accelerate.data_loader import DataLoaderShard
from transformers import Trainer

from job.distributed import process_group
from job.engines import gradient_checkpointing, sharding
from job.engines.data_timer import Waiting
from job.families.batches import COUNTED, FAILED, TOKENS, host_keys, model_inputs

if TYPE_CHECKING:
    import torch


def with_gradient(loss: "torch.Tensor", model: Any) -> "torch.Tensor":
    """The loss as it is, with a gradient of zero for what is trained if it depends on none of it.

    As where the vision tower alone is trained, and no row of a pass has an image. Processes add up
    their gradients, so none of them may leave a pass out.
    """
    if loss.requires_grad:
        return loss
    return loss + 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)


class StepTrainer(Trainer):
    """Transformers' own, with batches and a loss that several processes share.

    Each forward pass weighs as much as it has supervised tokens among those of the whole optimizer
    step, over all its passes and processes: the mean over tokens, however they are divided.
    """

    def __init__(self, *args: Any, batches: Any, waiting: Waiting, **kwargs: Any) -> None:
        """`batches` is the batch sampler of this process; `waiting` counts the time for them."""
        super().__init__(*args, **kwargs)
        self._batches, self._waiting = batches, waiting
        self._unseen = 0
        """The tokens of this step, over all its passes and processes, until they are counted."""
        self.model_accepts_loss_kwargs = True  # else the loss would be divided once more

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.args.device.type == "cpu":
            sharding.use_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def _prepare_for_training(self, *args: Any) -> Any:
        model, loader = super()._prepare_for_training(*args)
        if self.args.gradient_checkpointing:
            gradient_checkpointing.leave_frozen_parts(self.model)
        if sharding.is_sharded(model):
            sharding.keep_step(model)
        return model, loader

    def get_train_dataloader(self) -> DataLoaderShard:
        import torch

        args = self.args
        return DataLoaderShard(
            self.train_dataset,
            device=args.device,
            batch_sampler=self._batches,
            # Each iterator draws seeds for workers. From torch's own generator, what dropout draws
            # next would depend on how many iterators there were: on workers, and on resuming.
            generator=torch.Generator().manual_seed(args.seed),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory,
            _non_blocking=True,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: Any
    ) -> tuple[list[Any], Any]:
        # Whole, as libraries that patch the parent's count the tokens in their own way.
        samples = list(itertools.islice(self._waiting.of(epoch_iterator), num_batches))
        return samples, self._get_num_items_in_batch(samples, device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> "torch.Tensor":
        assert num_items_in_batch is not None
        assert not return_outputs
        # Gradients are averaged over processes, where a sum is wanted.
        share = inputs[COUNTED] * self.accelerator.num_processes / num_items_in_batch
        return with_gradient(model(**model_inputs(inputs)).loss, model) * share

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> int:
        for batch in batch_samples:
            if FAILED in batch:
                raise batch[FAILED]
        counted, self._unseen = process_group.all_reduce_sum(
            [sum(batch[key] for batch in batch_samples) for key in (COUNTED, TOKENS)]
        )
        return counted

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Counted on the host: Transformers asks the device in every pass, and waits for it."""
        self.state.num_input_tokens_seen += self._unseen
        self._unseen = 0

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Nothing reports it, and working it out walks through all modules in every pass."""
        return 0

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        # One copy back; read on the device, each value would be one.
        host = host_keys(prepared)
        return {k: v.cpu() if k in host else v for k, v in prepared.items()}
