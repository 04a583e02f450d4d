"""The stage's settings as the train section and TRL take them."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from job.engines.base import Engine
from job.spec.types import JobSpec, ReinforceSpec
from job.train.trainer_setup import arguments_of

if TYPE_CHECKING:
    from trl import GRPOConfig


def as_training(spec: JobSpec, *, on_gpu: bool) -> JobSpec:
    """The spec with the stage's settings in its train section, for the parts that both share."""
    own = spec.reinforce
    assert own is not None
    train = spec.train
    checkpointing = train.gradient_checkpointing
    return replace(
        spec,
        train=replace(
            train,
            per_device_train_batch_size=own.per_device_train_batch_size,
            gradient_accumulation_steps=own.gradient_accumulation_steps,
            learning_rate=own.learning_rate,
            vision_tower_lr=None,
            loraplus_lr_ratio=None,
            lr_scheduler_type=own.lr_scheduler_type,
            warmup_steps=own.warmup_steps,
            num_train_epochs=1.0,
            max_steps=own.max_steps,
            optim=own.optim,
            weight_decay=own.weight_decay,
            max_grad_norm=own.max_grad_norm,
            neftune_noise_alpha=None,
            logging_steps=own.logging_steps,
            save_steps=own.save_steps,
            eval_strategy=own.eval_strategy,
            eval_steps=own.eval_steps or own.save_steps,
            predict_with_generate=None,
            metric_for_best_model=spec.reinforcement_metric,
            load_best_model_at_end=own.load_best_model_at_end,
            early_stopping_patience=None,
            early_stopping_threshold=0.0,
            # Without a search for passes: on a GPU, memory first.
            gradient_checkpointing=on_gpu if checkpointing == "auto" else checkpointing,
            torch_compile=False,
            router_aux_loss_coef=0.0 if train.router_aux_loss_coef is not None else None,
            dataloader_num_workers=0,
            resume_from_checkpoint=("never" if train.resume_from_checkpoint == "never" else "auto"),
        ),
    )


def grpo_config(
    spec: JobSpec, own: ReinforceSpec, optim: str, engine: Engine, scratch: Path
) -> "GRPOConfig":
    """TRL's arguments; `spec` is that of `as_training`."""
    from trl import GRPOConfig

    return arguments_of(
        GRPOConfig,
        spec,
        optim,
        engine,
        scratch,
        num_generations=own.num_generations,
        steps_per_generation=own.gradient_accumulation_steps,
        num_iterations=own.num_iterations,
        max_completion_length=own.max_completion_length,
        temperature=own.temperature,
        top_p=own.top_p,
        top_k=0,
        # TRL would copy the adapter inside the model for the divergence; see `ReinforceTrainer`.
        beta=0.0,
        epsilon=own.epsilon,
        epsilon_high=own.epsilon_high,
        loss_type=own.loss_type,
        scale_rewards=own.scale_rewards,
        mask_truncated_completions=own.mask_truncated_completions,
        disable_dropout=True,
        shuffle_dataset=False,
        router_aux_loss_coef=0.0,
        log_completions=False,
    )
