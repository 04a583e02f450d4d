"""A `Trainer` whose checkpoints are safetensors and JSON only: reading one runs no code.

Transformers pickles the optimizer, the scheduler, the random state and its own arguments. Here the
same states are written by `state_files`; the arguments are omitted, because nothing reads them.
Fully fine-tuned weights are stored under their names in memory, and loading requires all of them;
if they are sharded, each process stores its shards (`shard_files`).

A checkpoint's content depends on the training alone, not on time or the number of interruptions.
After a resume, settings of further steps come from the spec.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, load_model, save_model
from transformers.utils import SAFE_WEIGHTS_NAME

from job.distributed import process_group
from job.engines import sharding
from job.engines.trainer import StepTrainer
from job.train.checkpoint import random_state, shard_files, state_files
from job.train.checkpoint.contents import (
    ADAPTER_WEIGHTS,
    KIND,
    OPTIMIZER,
    RANDOM_STATE,
    SCHEDULER,
    UNTOUCHED,
    stores_shards,
)
from job.train.outputs import with_sorted_lists

if TYPE_CHECKING:
    from accelerate.data_loader import DataLoaderShard

TIMINGS = frozenset(
    f"train_{name}"
    for name in ("runtime", "samples_per_second", "steps_per_second", "tokens_per_second")
) | {"eval_seconds"}
"""Keys under which timings are logged."""


class SafetensorsTrainer(StepTrainer):
    """Stores and restores its state without pickles."""

    _tr_loss: torch.Tensor
    """Sum of the losses since the last log."""
    _globalstep_last_logged: int

    # The checkpoint's own files, and the trainer's state.

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        super()._save_checkpoint(model, trial)
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (directory / "training_args.bin").unlink(missing_ok=True)
        if stores_shards(self):
            process_group.barrier()  # rank 0 is about to move the folder, which all have to fill

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        entry = self.state.log_history[-1]
        self.state.log_history[-1] = {k: v for k, v in entry.items() if k not in TIMINGS}

    def _init_training_state(self, max_steps: int, *args: object) -> tuple[int, int]:
        epochs_and_steps: tuple[int, int] = super()._init_training_state(max_steps, *args)
        # The checkpoint's state has its own logging and saving intervals; the spec's apply.
        self.state.compute_steps(self.args, max_steps)
        return epochs_and_steps

    # Weights.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not sharding.is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        if stores_shards(self):
            shard_files.store_weights(self.model, Path(output_dir or self.args.output_dir))
            return
        state = sharding.trained_state(self.model)
        if self.args.should_save:
            self._save(output_dir, state)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        directory = Path(output_dir or self.args.output_dir)
        if isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
            path = directory / "adapter_config.json"
            config = with_sorted_lists(json.loads(path.read_text()))
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            return
        # Under the names in memory: `save_pretrained` would write the published layout, and a
        # resume that loads by name would silently miss most weights.
        directory.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(directory / SAFE_WEIGHTS_NAME))

    def _prepare_for_training(
        self,
        max_steps: int,
        train_dataloader: "DataLoaderShard",
        resume_from_checkpoint: str | None,
    ) -> "tuple[torch.nn.Module, DataLoaderShard]":
        whole = self.is_fsdp_enabled and not stores_shards(self)
        if resume_from_checkpoint is not None and whole:
            # Load while every process has the whole model; Transformers would load after sharding.
            self._load_from_checkpoint(resume_from_checkpoint)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        if stores_shards(self):
            shard_files.load_weights(self.model, Path(resume_from_checkpoint))
            return
        if sharding.is_sharded(self.model):
            return
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.load_trained(Path(resume_from_checkpoint))

    def load_trained(self, checkpoint: Path) -> None:
        """Gives the model, which is not sharded, the trained weights of a checkpoint."""
        if isinstance(self.model, PeftModel):
            weights = load_file(checkpoint / ADAPTER_WEIGHTS)
            set_peft_model_state_dict(self.model, weights, self.model.active_adapter)
        else:
            load_model(self.model, checkpoint / SAFE_WEIGHTS_NAME, strict=True)

    def trained_state_of(self, checkpoint: Path) -> dict[str, torch.Tensor]:
        """The trained weights of a checkpoint of a sharded adapter, by their names in memory."""
        weights = dict(self.model.named_parameters())
        # PEFT's names are not these without the adapter's: DoRA's magnitudes lose an ending too.
        named = get_peft_model_state_dict(
            self.model, weights, self.model.active_adapter, save_embedding_layers=False
        )
        stored_name = {id(weight): name for name, weight in named.items()}
        stored = load_file(checkpoint / ADAPTER_WEIGHTS)
        return {
            name: stored[stored_name[id(weight)]]
            for name, weight in weights.items()
            if weight.requires_grad
        }

    # Optimizer and scheduler.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if stores_shards(self):
            optimizer = self.optimizer.optimizer
            state = shard_files.store_optimizer(self.model, optimizer, Path(output_dir))
        elif sharding.is_sharded(self.model):
            state = sharding.optimizer_state(self.model, self.optimizer.optimizer)
        else:
            state = self.optimizer.state_dict()
        if self.args.should_save:
            parameters = [key for group in state["param_groups"] for key in group["params"]]
            state[UNTOUCHED] = [key for key in parameters if key not in state["state"]]
            state[KIND] = type(self.optimizer.optimizer).__name__
            state_files.save(state, Path(output_dir, OPTIMIZER))
            state_files.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self._load_scheduler(state_files.load(Path(checkpoint, SCHEDULER)))
        optimizer = self.optimizer.optimizer
        if stores_shards(self):
            rates = self.lr_scheduler.get_last_lr()
            shard_files.load_optimizer(self.model, optimizer, Path(checkpoint), rates)
            return
        stored = state_files.load(Path(checkpoint, OPTIMIZER))
        # Learning rate, weight decay and so on come from the spec: a checkpoint that the spec names
        # by URI may be another training's.
        groups = [
            {**group, **own, "params": group["params"], "lr": rate}
            for group, own, rate in zip(
                stored["param_groups"],
                optimizer.param_groups,
                self.lr_scheduler.get_last_lr(),
                strict=True,
            )
        ]
        state = {"state": stored["state"], "param_groups": groups}
        if sharding.is_sharded(self.model):
            sharding.restore_optimizer(self.model, optimizer, state)
        else:
            optimizer.load_state_dict(state)

    def _load_scheduler(self, state: dict[str, Any]) -> None:
        """Moves this training's schedule to the step of `state`."""
        scheduler = self.lr_scheduler
        peaks = scheduler.base_lrs
        scheduler.load_state_dict(state)
        scheduler.base_lrs = peaks
        scheduler._last_lr = [
            peak * factor(scheduler.last_epoch)
            for peak, factor in zip(peaks, scheduler.lr_lambdas, strict=True)
        ]

    # Random state, one file per process, and the losses since the last log.

    def _save_rng_state(self, output_dir: str) -> None:
        own: dict[str, Any] = {
            **random_state.capture(),
            # Otherwise a stop between two logs would lose these.
            "loss": self._tr_loss,
            "logged": self._globalstep_last_logged,
        }
        every = process_group.all_gather(own)
        if self.args.should_save:
            for rank, state in enumerate(every):
                state_files.save(state, Path(output_dir, _random_state_file(rank)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        own = Path(checkpoint, _random_state_file(process_group.rank()))
        if not own.with_suffix(state_files.STRUCTURE).exists():
            return  # the checkpoint has fewer processes, and none of this rank
        state = state_files.load(own)
        random_state.restore(state)
        self._tr_loss = state["loss"].to(self._tr_loss)
        self._globalstep_last_logged = state["logged"]


def _random_state_file(rank: int) -> str:
    return f"{RANDOM_STATE}_{rank}" if rank else RANDOM_STATE
