"""Which stages hold the whole model on one device, and whether that has the memory.

With `runtime.distributed: fsdp2`, a model may be trained that no GPU can hold. Rank 0 alone
evaluates and exports, with the whole model on its device.
"""

from collections.abc import Sequence

from job import families, log
from job.errors import InputError, OutOfMemoryError, StorageError
from job.pipeline.context import RunContext
from job.pipeline.fingerprints import Stage


def require_room(run: RunContext, stages: Sequence[Stage]) -> None:
    """Raises OutOfMemoryError if a stage to come needs the whole model on a device that is too
    small for its weights.

    Reads the architecture only. A model that cannot be read is reported later, by its first use.
    """
    from job.engines.device import resolve_dtype
    from job.engines.memory import weight_bytes

    spec, device = run.spec, run.accelerator
    if not spec.shards_weights:
        return
    needing = [
        stage
        for stage in stages
        if _holds_whole_model(run, stage) and not run.output.stages.markers.exists(stage)
    ]
    if not needing:
        return
    try:
        family, skeleton = families.architecture(spec.model)
    except (InputError, StorageError):
        return
    dtype = resolve_dtype(spec.model, spec.lora, device)
    weights = weight_bytes(family, skeleton, dtype.itemsize, spec)
    if weights <= device.memory_bytes:
        return
    if "train" in needing:
        fix = "train on larger devices, or weights that are read: model.init: pretrained"
    else:
        fix = (
            "use the command train, which shards the model; then the command run, with as many "
            "processes and runtime.accelerator: cpu, which does the rest in the machine's memory"
        )
    raise OutOfMemoryError(
        "$.runtime.distributed",
        f"the whole model must fit on one device in {', '.join(needing)}: its weights take "
        f"{log.size(weights)}, and {device.name} has {log.size(device.memory_bytes)}",
        value=spec.runtime.distributed,
        fix=fix,
    )


def _holds_whole_model(run: RunContext, stage: Stage) -> bool:
    spec = run.spec
    if stage == "baseline":
        return spec.eval.baseline
    if stage == "train":
        return not spec.reads_shards_only
    return stage == "eval" or (stage == "export" and spec.export.merged.enabled)
