"""Captures the passes of a training, in the buckets that its micro-batches fall into."""

from dataclasses import dataclass
from typing import Any, cast

from job import log
from job.distributed import process_group
from job.engines.captured_steps import Capture, CapturedSteps, CaptureFailed, Inputs
from job.engines.device import is_plain, release_memory, trains_weights
from job.families.batches import to_device
from job.families.packed_shape import PackedShape
from job.spec.types import JobSpec
from job.train.adapting import AdaptedModel
from job.train.buckets import Buckets, choose_buckets
from job.train.heaviest_batches import MAX_ROWS, at_most, planned_batches
from job.train.train_context import TrainContext
from job.train.trainer_setup import planned_sampler
from job.train.training_rows import TrainingRows


@dataclass(frozen=True, kw_only=True)
class CapturedTraining:
    steps: CapturedSteps
    buckets: Buckets

    def to_json(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "graphs": len(self.buckets.shapes),
            "tokens": [shape.tokens for shape in self.buckets.shapes],
            "padding": round(self.buckets.padding, 4),
            "seconds": round(self.steps.seconds, 3),
        }


def capture_training(
    context: TrainContext,
    spec: JobSpec,
    rows: TrainingRows,
    adapted: AdaptedModel,
    capture: Capture | None = None,
) -> CapturedTraining | None:
    """Captures a pass for each bucket; None, with the reason in the log, if that is not possible.

    `spec` has the batch size that fits. All processes of a group have to call it, and all or none
    of them capture. `capture` is for tests.
    """
    reason = None if capture else why_eager(context, spec, adapted)
    if reason is not None:
        say = log.debug if context.engine.device.type == "cpu" else log.info
        say("passes are not captured as graphs", reason=reason)
        return None
    batches = planned_batches(planned_sampler(spec, rows, padding_free=True), spec.train)
    examples: dict[PackedShape, list[int]] = {}
    shapes: list[PackedShape] = []
    for batch in at_most(MAX_ROWS, batches):
        numbers = [max(row, 0) for row in batch]  # a dummy row is a copy of the first one
        shapes.append(rows.filtered.sizes.shape(numbers))
        examples.setdefault(shapes[-1], numbers)
    buckets = choose_buckets(shapes, context.family.bucket)

    def inputs(bucket: PackedShape) -> Inputs:
        """The inputs of a batch, padded to the bucket."""
        fitting = next(batch for shape, batch in examples.items() if shape.fits(bucket))
        encoded = [rows.dataset.row(row) for row in fitting]
        packed = context.family.pack(encoded, bucket)
        return cast(Inputs, dict(to_device(packed, context.engine.device)))

    steps: CapturedSteps | None = None
    failure = "it failed in another process"
    try:
        batches_to_capture = [inputs(bucket) for bucket in buckets.shapes]
        steps = CapturedSteps(adapted.model.train(), batches_to_capture, capture)
    except CaptureFailed as error:
        failure = str(error)
    if process_group.any_rank(steps is None) or steps is None:
        if steps is not None:
            steps.release()
        release_memory()
        log.warn("passes are not captured as graphs", reason=failure)
        return None
    captured = CapturedTraining(steps=steps, buckets=buckets)
    log.info(
        "passes are captured as graphs",
        graphs=len(buckets.shapes),
        tokens=", ".join(f"{shape.tokens:,}" for shape in buckets.shapes),
        padding=f"{buckets.padding:.1%}",
        took=log.seconds(steps.seconds),
    )
    return captured


def why_eager(context: TrainContext, spec: JobSpec, adapted: AdaptedModel) -> str | None:
    """Why the passes cannot be captured; None if they can, as far as the settings tell."""
    train, lora = spec.train, spec.lora
    reasons = {
        "a CPU has no graphs": context.engine.device.type == "cpu",
        "train.cuda_graphs is false": not train.cuda_graphs,
        "only the padding-free step can be captured": not adapted.padding_free,
        "FSDP2 communicates within a pass": spec.runtime.distributed == "fsdp2",
        "gradient checkpointing recomputes activations": bool(train.gradient_checkpointing),
        "only plain LoRA can be captured, without dropout or DoRA": trains_weights(lora)
        or not is_plain(lora),
        "train.neftune_noise_alpha draws noise in each pass": train.neftune_noise_alpha is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
