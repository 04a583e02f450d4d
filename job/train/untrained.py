"""A train stage without steps: stores the adapter that reinforcement starts from, as it is."""

from typing import TYPE_CHECKING

from job import log
from job.train.adapting import AdaptedModel
from job.train.outputs import store_weights
from job.train.result import TrainResult, rows_per_step
from job.train.train_context import TrainContext
from job.train.training_rows import TrainingRows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def store_untrained(
    context: TrainContext, rows: TrainingRows, adapted: AdaptedModel
) -> "tuple[PreTrainedModel | PeftModel, TrainResult]":
    """Stores the adapter, a new one or that of `model.adapter_name_or_path`, and an empty history.

    For `train.max_steps: 0`, in one process.
    """
    spec, directory = context.spec, context.directory
    log.info("nothing is trained before reinforcement", max_steps=0)
    (context.train_directory / "history.jsonl").touch()
    model = adapted.model.eval()
    store_weights(spec, context.family, model, None, directory)
    return model, TrainResult(
        steps=0,
        fit=None,
        computing={},
        ways={},
        captured=None,
        processes=1,
        rows_a_step=rows_per_step(spec),
        resumed_from_step=0,
        epochs=0.0,
        rows=len(rows.dataset),
        dropped_rows=rows.filtered.dropped,
        first_loss=None,
        final_loss=None,
        tokens=0,
        seconds=0.0,
        tokens_per_second=0.0,
        tflops=None,
        mfu=None,
        data_wait_seconds=0.0,
        data_wait_share=0.0,
        peak_memory_bytes=context.accelerator.peak_memory_bytes(),
        trainable_parameters=adapted.trainable_parameters,
        total_parameters=adapted.total_parameters,
        optim="none",
        lora_targets=adapted.targets,
        validation=None,
        learning_rates={},
    )
