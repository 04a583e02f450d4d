"""TRL's `GRPOTrainer` with this project's families, generation, training step and checkpoints.

From TRL: advantages from rewards, the losses, clipping, the divergence, and their metrics. From
`StepTrainer`: the optimizer step. From `ValidatingTrainer` and `SafetensorsTrainer`: validation,
and checkpoints from which a run resumes bit by bit on a CPU.

    train_step            one optimizer step (`job.engines.trainer`)
      training_step       a pass, by TRL:
        _prepare_inputs   at the first pass of a rollout: answers and their advantages
          _answer         samples the answers
        compute_loss      TRL's loss of the log-probabilities of `answer_scores`, for those answers
                          that have an advantage
"""

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOTrainer

from job import signals
from job.engines import gradient_checkpointing
from job.engines.free_memory import is_out_of_memory
from job.engines.trainer import attach_gradient
from job.errors import OutOfMemoryError
from job.evaluation.sampling import AtOnce, Sampling, sample_answers
from job.families.base import Family
from job.reinforce.advantages import affecting_gradient, equal_group_share, without_rounding_errors
from job.reinforce.answer_scores import Answers, AnswerScores
from job.reinforce.prompts import Prompts
from job.reinforce.scoring import Sample, Scorer
from job.reinforce.special_tokens import padded, special_tokens_kept
from job.train.adapting import AdaptedModel
from job.train.checkpoint import random_state, state_files
from job.train.outputs import autocast_removed
from job.train.validating_trainer import ValidatingTrainer

if TYPE_CHECKING:
    from accelerate.data_loader import DataLoaderShard

ROLLOUTS = "rollouts"
"""The file of a checkpoint with answers that later steps still learn from."""

Tensors = dict[str, Any]


class ReinforceTrainer(ValidatingTrainer, GRPOTrainer):
    """Trains the adapter of a model on the rewards of its own answers; in one process."""

    section = "reinforce"
    state: Any
    processing_class: Any

    def __init__(
        self,
        *,
        adapted: AdaptedModel,
        family: Family,
        prompts: Prompts,
        scorer: Scorer,
        sampling: Sampling,
        beta: float,
        **kwargs: Any,  # noqa: ANN401 - those of the trainers above
    ) -> None:
        """`beta` weights the divergence from the adapter as it is now."""
        from datasets import Dataset

        self._adapted, self._family = adapted, family
        self.prompts, self._scorer, self._sampling = prompts, scorer, sampling
        rows = list(range(len(prompts.rows)))
        own_forward = vars(adapted.base).get("forward")
        tokenizer = padded(family.processor.tokenizer)
        with warnings.catch_warnings(action="ignore"), special_tokens_kept(adapted.base):
            super().__init__(
                model=adapted.model,
                reward_funcs=scorer.functions(),
                train_dataset=Dataset.from_dict({"prompt": [""] * len(rows), "row": rows}),
                processing_class=tokenizer,
                rollout_func=self._answer,
                **kwargs,
            )
        self._skip_frozen_inputs()
        self.data_collator = _collate
        self.reward_weights = torch.tensor(scorer.weights)
        # TRL has given the model another output layer, for which `token_scores` stands in.
        vars(adapted.base).pop("forward", None)
        if own_forward is not None:
            adapted.base.forward = own_forward
        self.eos_token_ids = list(family.end_tokens)
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        self.beta = beta
        # Stands for the adapter at the start, whose weights `_reference` puts in place.
        self.ref_model = object() if beta else None
        self._start = {name: p.detach().clone() for name, p in self._trained()} if beta else {}
        self._rows: Sequence[int] = ()
        # Of a pass: flags of the answers that are computed, and how likely all were when sampled.
        self._computed: torch.Tensor | None = None
        self._sampled: torch.Tensor | None = None
        self._scores = AnswerScores(
            adapted=adapted,
            family=family,
            prompts=prompts,
            temperature=sampling.temperature,
            autocast=self.accelerator.autocast,
        )
        self._at_once = AtOnce.on(adapted.base.device)
        self._saved_step = 0
        self.generating_seconds = 0.0
        """Of this session's rollouts."""
        self.generated_tokens = 0
        self.samples: list[Sample] = []
        """Of the last rollout."""
        self.first_samples: list[dict[str, Any]] = []
        self.last_samples: list[dict[str, Any]] = []
        """Of the first step and of the last one with a rollout, whatever session they were in."""

    # --- what TRL would do beside the training -----------------------------------------------

    def _send_telemetry(self) -> None:
        """Sends nothing to the hub."""

    def create_model_card(self, *_: object, **__: object) -> None:
        """Writes no card into a checkpoint."""

    def train_step(
        self,
        model: torch.nn.Module,
        loader: Iterator[Any],
        *,
        epoch: float,
        **more: Any,  # noqa: ANN401 - those of the trainer above
    ) -> None:
        """One optimizer step; an epoch is one time through the rows, as answers were asked for."""
        rollouts = self.state.global_step // self.num_iterations + 1
        rows_a_rollout = self.args.generation_batch_size // self.num_generations
        epoch = rollouts * rows_a_rollout / len(self.prompts.rows)
        try:
            super().train_step(model, loader, epoch=epoch, **more)
        except _RolloutStopped as stopped:
            self._store_before_rollout(model, stopped.random)

    def _store_before_rollout(self, model: torch.nn.Module, random: dict[str, Any]) -> None:
        """Stores the state after the last whole step, unless it is stored, and ends the training.

        Until a rollout ends, nothing but the random state differs from it.
        """
        random_state.restore(random)
        self.control.should_training_stop = True
        if self.state.global_step != self._saved_step:
            self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
            self._save_checkpoint(model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    # --- a rollout ---------------------------------------------------------------------------

    def _prepare_inputs(  # type: ignore[override]
        self, inputs: Mapping[str, Any]
    ) -> Tensors:
        prepared: Tensors = GRPOTrainer._prepare_inputs(self, inputs["samples"])
        return prepared

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Tensors:
        self._rows = [each["row"] for each in inputs]
        batch: Tensors = super()._generate_and_score_completions(inputs)
        self._skip_frozen_inputs()
        self.samples = self._scorer.samples(self.state.global_step + 1)
        advantages = without_rounding_errors(batch["advantages"], self.num_generations)
        # TRL's share is that of deviations near 0, and with scale_rewards: batch, of the step's.
        self._metrics["train"]["frac_reward_zero_std"][-1] = equal_group_share(
            advantages, self.num_generations
        )
        return {**batch, "advantages": advantages, "rows": torch.tensor(self._rows)}

    def _skip_frozen_inputs(self) -> None:
        """After TRL has enabled gradient checkpointing, at first and after each rollout."""
        if self.args.gradient_checkpointing:
            gradient_checkpointing.skip_frozen_inputs(self.model)

    def _answer(self, _: Sequence[str], __: GRPOTrainer) -> dict[str, Any]:
        """TRL's `rollout_func`: an answer to each listed row, with its end token.

        Raises OutOfMemoryError if one answer alone does not fit.
        """
        started, random = time.monotonic(), random_state.capture()
        self.require_finite()
        prompts = [self.prompts.encoded(row) for row in self._rows]
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with autocast_removed(self.model):
                answers = sample_answers(
                    self.model,
                    self._family,
                    prompts,
                    self._sampling,
                    at_once=self._at_once,
                    stop=lambda: signals.received() is not None,
                )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                "$.reinforce.max_completion_length",
                "generating a single answer does not fit into the memory",
                value=self._sampling.max_new_tokens,
                fix="lower it, or data.max_pixels",
            ) from error
        finally:
            for module, training in modes:
                module.training = training
        if signals.received() is not None:
            raise _RolloutStopped(random)
        self.generating_seconds += time.monotonic() - started
        self.generated_tokens += sum(map(len, answers))
        return {
            "prompt_ids": [list(prompt.input_ids) for prompt in prompts],
            "completion_ids": answers,
            "logprobs": None,
        }

    # --- the loss ----------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> torch.Tensor:
        """TRL's loss () of a pass; its gradients add up to the step's.

        The model is not run on answers that add nothing to them. They stay in what TRL divides by.
        """
        assert not return_outputs
        self._rows = inputs["rows"].tolist()
        self._computed = computed = affecting_gradient(inputs, self.beta)
        self._sampled = inputs.get("old_per_token_logps")
        try:
            loss = GRPOTrainer._compute_loss(self, model, inputs)
        finally:
            self._computed = self._sampled = None
        return attach_gradient(loss, model, all_weights=not computed.all())

    def _get_per_token_logps_and_entropies(
        self,
        model: object,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Log-probabilities and entropies (B, C) of the last C = `logits_to_keep` tokens, and no
        auxiliary loss. `self._rows` are the rows of the B answers."""
        tokens, present = (x[:, -logits_to_keep:] for x in (input_ids, attention_mask))
        answers = Answers(rows=self._rows, tokens=tokens, present=present)
        if self._computed is not None:
            return *self._scores.of_some(answers, self._computed, self._sampled), None
        with self._reference() if model is self.ref_model else nullcontext():
            return *self._scores.of_all(answers, batch_size or len(answers)), None

    @contextmanager
    def _reference(self) -> Iterator[None]:
        """A context in which the adapter has the weights that the stage started from."""
        own = {name: p.detach().clone() for name, p in self._trained()}
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(self._start[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._trained():
                    parameter.copy_(own[name])

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((n, p) for n, p in self._adapted.model.named_parameters() if p.requires_grad)

    # --- the log -----------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's metrics go with those of a step, not with those of a validation."""
        kept = None
        if "loss" not in logs:
            kept, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        super().log(logs, start_time)
        # Checkpoints do not depend on time.
        self.state.log_history[-1].pop("step_time", None)
        if kept is not None:
            self._metrics["train"] = kept

    # --- checkpoints -------------------------------------------------------------------------

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None
    ) -> None:
        tokenizer, self.processing_class = self.processing_class, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class = tokenizer

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        super()._save_checkpoint(model, trial)
        self._saved_step = self.state.global_step

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        passes = self.args.steps_per_generation * self.num_iterations
        left = self._buffered_inputs if self._step % passes else None
        state_files.save(
            {
                "buffered": left,
                "metrics": {k: list(v) for k, v in self._metrics["train"].items()},
                "samples": self.first_samples,
                "last_samples": self.last_samples,
            },
            Path(output_dir, ROLLOUTS),
        )

    def _run_epoch(  # type: ignore[override]
        self,
        model: torch.nn.Module,
        epoch: int,
        train_dataloader: "DataLoaderShard",
        *,
        resume_from_checkpoint: str | None,
        **more: Any,  # noqa: ANN401 - those of the trainers above
    ) -> None:
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._saved_step = self.state.global_step
        if resume_from_checkpoint is not None:
            stored = state_files.load(Path(resume_from_checkpoint, ROLLOUTS))
            device = self.accelerator.device
            self._buffered_inputs = stored["buffered"] and [
                {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in each.items()}
                for each in stored["buffered"]
            ]
            self._metrics["train"] = defaultdict(list, stored["metrics"])
        super()._run_epoch(
            model,
            epoch,
            train_dataloader,
            resume_from_checkpoint=resume_from_checkpoint,
            **more,
        )

    def restore_samples(self, directory: Path) -> None:
        """From a checkpoint; also if nothing is left to train, when no epoch runs."""
        stored = state_files.load(Path(directory, ROLLOUTS))
        self.first_samples, self.last_samples = stored["samples"], stored["last_samples"]


class _RolloutStopped(Exception):
    """A signal has arrived before the answers were there; `random` is the state before them."""

    def __init__(self, random: dict[str, Any]) -> None:
        super().__init__()
        self.random = random


def rollouts_problem(directory: Path) -> str | None:
    """Why the answers in a checkpoint cannot be used; None if they can."""
    try:
        stored = state_files.load(Path(directory, ROLLOUTS))
        if not {"buffered", "metrics", "samples", "last_samples"} <= stored.keys():
            return f"{ROLLOUTS} lacks the answers, the metrics or the samples"
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        return f"{ROLLOUTS} cannot be read: {type(error).__name__}: {error}"
    return None


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """What `StepTrainer` and TRL each take; tokens are counted once they are generated."""
    return {"samples": items, "counted_tokens": 1, "tokens": 0, "images": 0}
