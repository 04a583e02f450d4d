"""A `Trainer` whose checkpoints hold safetensors and JSON only, so that reading one runs no code.

Transformers pickles the optimizer, the scheduler, the generators and its own arguments. Here the
same states go through `state_files`; the arguments are not read again, and left out. Weights that
are trained themselves are stored by their names in memory, and every one has to be there again.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_model, save_model
from transformers.utils import SAFE_WEIGHTS_NAME

from job.engines import group, sharding
from job.train import state_files

if TYPE_CHECKING:
    from transformers import Trainer

OPTIMIZER, SCHEDULER, GENERATORS = "optimizer", "scheduler", "rng_state"


def _generators(rank: int) -> str:
    return f"{GENERATORS}_{rank}" if rank else GENERATORS


def resumable(base: type["Trainer"]) -> type["Trainer"]:
    """`base`, storing and restoring its states without pickles."""

    class ResumableTrainer(base):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (directory / "training_args.bin").unlink(missing_ok=True)

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
                state_files.save(state, Path(output_dir, OPTIMIZER))
                state_files.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is None:
                return
            state = state_files.load(Path(checkpoint, OPTIMIZER))
            if sharding.is_sharded(self.model):
                sharding.restore_optimizer(self.model, self.optimizer.optimizer, state)
            else:
                self.optimizer.load_state_dict(state)
            self.lr_scheduler.load_state_dict(state_files.load(Path(checkpoint, SCHEDULER)))

        def _save_rng_state(self, output_dir: str) -> None:
            states: dict[str, Any] = {
                "python": random.getstate(),
                "numpy": np.random.get_state(),
                "torch": torch.random.get_rng_state(),
            }
            if torch.cuda.is_available():  # on ROCm too, under the same name
                states["cuda"] = torch.cuda.random.get_rng_state()
            every = group.gathered(states)
            if self.args.should_save:
                for rank, each in enumerate(every):
                    state_files.save(each, Path(output_dir, _generators(rank)))

        def _load_rng_state(self, checkpoint: str | None) -> None:
            if checkpoint is None:
                return
            own = Path(checkpoint, _generators(group.rank()))
            if not own.with_suffix(state_files.STRUCTURE).exists():
                return  # there were fewer processes, and this one is new
            states = state_files.load(own)
            random.setstate(states["python"])
            np.random.set_state(states["numpy"])
            torch.random.set_rng_state(states["torch"])
            if torch.cuda.is_available() and "cuda" in states:
                torch.cuda.random.set_rng_state(states["cuda"])

    return ResumableTrainer
