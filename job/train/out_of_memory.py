"""Detects out-of-memory errors, and suggests what to change in the spec."""

from job import log
from job.engines.device import Accelerator
from job.engines.free_memory import is_out_of_memory
from job.errors import OutOfMemoryError
from job.families.held_out_loss import rows_of_a_batch
from job.spec.types import TrainSpec

FIELD = "$.train.per_device_train_batch_size"
VALIDATION_FIELD = "$.train.per_device_eval_batch_size"


def raise_if_validation_does_not_fit(
    error: BaseException, spec: TrainSpec, accelerator: Accelerator
) -> None:
    """Raises OutOfMemoryError if a batch of a validation ran out of memory."""
    if not is_out_of_memory(error):
        return
    rows = rows_of_a_batch(spec.per_device_eval_batch_size)
    raise OutOfMemoryError(
        VALIDATION_FIELD,
        f"a batch of validation rows does not fit into the {log.size(accelerator.memory_bytes)} "
        f"of {accelerator.name}",
        value=rows,
        fix=(
            f"--set train.per_device_eval_batch_size={max(1, rows // 2)}"
            if rows > 1
            else "lower data.max_pixels or train.max_length"
        ),
    ) from error


def raise_if_out_of_memory(error: BaseException, spec: TrainSpec, accelerator: Accelerator) -> None:
    if not is_out_of_memory(error):
        return
    raise OutOfMemoryError(
        FIELD,
        f"a training step does not fit into the {log.size(accelerator.memory_bytes)} "
        f"of {accelerator.name}",
        value=spec.per_device_train_batch_size,
        fix=_smaller_step(spec, accelerator),
    ) from error


def _smaller_step(spec: TrainSpec, accelerator: Accelerator) -> str:
    """What to set for the same rows a step in less memory; `spec` is what the step was run with."""
    rows, passes = spec.per_device_train_batch_size, spec.gradient_accumulation_steps
    if rows == 1:
        less = "lower data.max_pixels or train.max_length"
        if spec.gradient_checkpointing is True:
            return less
        return f"--set train.gradient_checkpointing=true, or {less}"
    part = max(n for n in range(1, rows // 2 + 1) if rows % n == 0)
    # The search would otherwise choose the same passes again.
    no_search = "--set train.fit=off " if accelerator.kind != "cpu" or spec.fit == "on" else ""
    return (
        f"{no_search}--set train.per_device_train_batch_size={part} "
        f"--set train.gradient_accumulation_steps={passes * (rows // part)}"
    )
