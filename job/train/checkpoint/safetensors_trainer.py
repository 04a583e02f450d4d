"""A `Trainer` whose checkpoints hold safetensors and JSON only, so that reading one runs no code.

Transformers pickles the optimizer, the scheduler, the generators and its own arguments. Here the
same states go through `state_files`; the arguments are not read again, and left out. Weights that
are trained themselves are stored by their names in memory, and every one has to be there again.

What a checkpoint holds depends on the training alone: not on the time, nor on how often it was
interrupted. What the spec says of the steps to come is taken from the spec.
"""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_model, save_model
from transformers.utils import SAFE_WEIGHTS_NAME

from job.distributed import process_group
from job.engines import sharding
from job.train.checkpoint import state_files
from job.train.checkpoint.contents import GENERATORS, KIND, OPTIMIZER, SCHEDULER, UNTOUCHED

if TYPE_CHECKING:
    from transformers import Trainer

CLOCKED = frozenset(
    f"train_{name}"
    for name in ("runtime", "samples_per_second", "steps_per_second", "tokens_per_second")
)
"""What Transformers logs of the time that steps took."""


def _generators(rank: int) -> str:
    return f"{GENERATORS}_{rank}" if rank else GENERATORS


def resumable(base: type["Trainer"]) -> type["Trainer"]:
    """`base`, storing and restoring its states without pickles."""

    class ResumableTrainer(base):
        _tr_loss: torch.Tensor
        """Of the steps since the last log, their sum."""
        _globalstep_last_logged: int

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (directory / "training_args.bin").unlink(missing_ok=True)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs, start_time)
            entry = self.state.log_history[-1]
            self.state.log_history[-1] = {k: v for k, v in entry.items() if k not in CLOCKED}

        def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
            begun = super()._init_training_state(max_steps, *args)
            # A checkpoint also names the steps between logs and saves that were asked for then.
            self.state.compute_steps(self.args, max_steps)
            return begun

        def _run_epoch(self, **course: Any) -> None:
            if self.state.global_step >= self.state.max_steps:
                # Transformers would train one more step, and only then compare.
                self.control.should_training_stop = True
                return
            super()._run_epoch(**course)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            if not sharding.is_sharded(self.model):
                super().save_model(output_dir, _internal_call)
                return
            state = sharding.trained_state(self.model)
            if self.args.should_save:
                self._save(output_dir, state)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            if isinstance(self.model, PeftModel):
                super()._save(output_dir, state_dict)
                _sort_lists(Path(output_dir or self.args.output_dir, "adapter_config.json"))
                return
            # By the names of the model in memory: `save_pretrained` writes those of the published
            # layout, and what a resume then reads by name would silently miss most weights.
            directory = Path(output_dir or self.args.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(directory / SAFE_WEIGHTS_NAME))

        def _prepare_for_training(self, max_steps: int, loader: Any, checkpoint: Any) -> Any:
            if checkpoint is not None and self.is_fsdp_enabled:
                # While every process has the whole model; Transformers does it afterwards.
                self._load_from_checkpoint(checkpoint)
            return super()._prepare_for_training(max_steps, loader, checkpoint)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            if sharding.is_sharded(self.model):
                return
            if isinstance(self.model, PeftModel):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            weights = Path(resume_from_checkpoint, SAFE_WEIGHTS_NAME)
            load_model(self.model, weights, strict=True)

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            if sharding.is_sharded(self.model):
                state = sharding.optimizer_state(self.model, self.optimizer.optimizer)
            else:
                state = self.optimizer.state_dict()
            if self.args.should_save:
                every = [key for group in state["param_groups"] for key in group["params"]]
                state[UNTOUCHED] = [key for key in every if key not in state["state"]]
                state[KIND] = type(self.optimizer.optimizer).__name__
                state_files.save(state, Path(output_dir, OPTIMIZER))
                state_files.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is None:
                return
            self._load_scheduler(state_files.load(Path(checkpoint, SCHEDULER)))
            optimizer = self.optimizer.optimizer
            stored = state_files.load(Path(checkpoint, OPTIMIZER))
            # What moves the weights from here on is as the spec says now: a checkpoint that it
            # names by URI may be of other rates.
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
            """The schedule of this training, at the step of the `state`."""
            scheduler = self.lr_scheduler
            peaks = scheduler.base_lrs
            scheduler.load_state_dict(state)
            scheduler.base_lrs = peaks
            scheduler._last_lr = [
                peak * share(scheduler.last_epoch)
                for peak, share in zip(peaks, scheduler.lr_lambdas, strict=True)
            ]

        def _save_rng_state(self, output_dir: str) -> None:
            states: dict[str, Any] = {
                "python": random.getstate(),
                "numpy": np.random.get_state(),
                "torch": torch.random.get_rng_state(),
                # Losses since the last log, which a stop between two logs would lose.
                "loss": self._tr_loss,
                "logged": self._globalstep_last_logged,
            }
            if torch.cuda.is_available():  # on ROCm too, under the same name
                states["cuda"] = torch.cuda.random.get_rng_state()
            every = process_group.all_gather(states)
            if self.args.should_save:
                for rank, each in enumerate(every):
                    state_files.save(each, Path(output_dir, _generators(rank)))

        def _load_rng_state(self, checkpoint: str | None) -> None:
            if checkpoint is None:
                return
            own = Path(checkpoint, _generators(process_group.rank()))
            if not own.with_suffix(state_files.STRUCTURE).exists():
                return  # there were fewer processes, and this one is new
            states = state_files.load(own)
            random.setstate(states["python"])
            np.random.set_state(states["numpy"])
            torch.random.set_rng_state(states["torch"])
            self._tr_loss = states["loss"].to(self._tr_loss)
            self._globalstep_last_logged = states["logged"]
            if torch.cuda.is_available() and "cuda" in states:
                torch.cuda.random.set_rng_state(states["cuda"])

    return ResumableTrainer


def _sort_lists(path: Path) -> None:
    """PEFT writes sets in the order of the day; equal adapters shall be equal files."""
    config = json.loads(path.read_text())
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
