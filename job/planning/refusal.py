"""The errors of a plan that cannot be carried out: missing data, or too little memory."""

from job import log
from job.errors import InputError, OutOfMemoryError
from job.planning.facts import Plan


def refuse_missing_data(plan: Plan) -> None:
    """Raises InputError, as a run would, if data is missing or access to it is denied."""
    if plan.data.missing:
        raise InputError.from_problems(plan.data.missing)


def refuse_if_too_large(plan: Plan) -> None:
    """Raises OutOfMemoryError, with the nearest change that helps, if training fits nowhere."""
    memory = plan.memory
    if memory is None or any(fit.fits for fit in memory.fits):
        return
    largest = max(memory.fits, key=lambda fit: fit.memory)
    if memory.change is not None and memory.change_total is not None:
        settings = " ".join(f"--set {key}={_yaml(value)}" for key, value in memory.change.items())
        fix = f"{settings} takes {log.size(memory.change_total)}"
    else:
        fixed = largest.parts["weights"] + largest.parts["optimizer"] + largest.parts["gradients"]
        fix = (
            "use a larger accelerator: weights, gradients and optimizer states alone take "
            f"{log.size(fixed)}"
        )
    taken = f"training would take {log.size(largest.total)}"
    if largest.loading > largest.memory:
        taken = (
            "loading the weights, before the first step, would take "
            f"{log.size(largest.loading)} in every process"
        )
    raise OutOfMemoryError(
        "$.train.per_device_train_batch_size",
        f"{taken}, and {largest.title} has {log.size(largest.memory)}"
        f"{'' if memory.basis == 'sample' else ' (rows as long as max_length)'}",
        value=memory.batch_rows,
        fix=fix,
    )


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
