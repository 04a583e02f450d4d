"""The end of a plan that nobody can carry out: its data is missing, or no accelerator suffices."""

from job import log
from job.errors import InputError, OutOfMemoryError
from job.planning.facts import Plan


def refuse_missing_data(plan: Plan) -> None:
    """Raises InputError, as a run would, where data is missing or denied."""
    if plan.data.missing:
        raise InputError.from_problems(plan.data.missing)


def refuse_what_does_not_fit(plan: Plan) -> None:
    """Raises OutOfMemoryError, with the nearest change that helps, where training fits nowhere."""
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
            f"take a larger accelerator: weights, gradients and optimizer alone are "
            f"{log.size(fixed)}"
        )
    raise OutOfMemoryError(
        "$.train.per_device_train_batch_size",
        f"training would take {log.size(largest.total)} of the {log.size(largest.memory)} "
        f"of {largest.title}{'' if memory.basis == 'sample' else ', at rows of max_length'}",
        value=memory.batch_rows,
        fix=fix,
    )


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
