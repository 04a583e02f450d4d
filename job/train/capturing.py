"""Captures the passes of a training, in the buckets that its micro-batches fall into."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from job import log
from job.distributed import process_group
from job.engines import gradient_checkpointing
from job.engines.captured_steps import Capture, CapturedSteps, CaptureFailed, Inputs
from job.engines.device import release_memory
from job.engines.ways import CAPTURED
from job.families.batches import to_device
from job.families.packed_shape import PackedShape
from job.spec.types import JobSpec
from job.train.adapting import AdaptedModel
from job.train.buckets import Buckets, choose_buckets
from job.train.capture_choice import why_eager
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


def may_capture(context: TrainContext, adapted: AdaptedModel) -> bool:
    """Whether passes can be captured, as far as the spec tells."""
    return _why_eager(context, adapted) is None


def _why_eager(context: TrainContext, adapted: AdaptedModel) -> str | None:
    return why_eager(
        context.spec,
        on_gpu=context.engine.device.type != "cpu",
        padding_free=adapted.padding_free,
        trial_obstacle=context.ways.obstacle(CAPTURED),
    )


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
    reason = None if capture else _why_eager(context, adapted)
    if reason is not None:
        say = log.debug if context.engine.device.type == "cpu" else log.info
        say("passes are not captured as graphs", reason=reason)
        return None
    examples, shapes = _planned_shapes(spec, rows)
    buckets = choose_buckets(shapes, context.family.bucket)
    if spec.train.gradient_checkpointing:
        gradient_checkpointing.enable(adapted.model, draws=False)
    steps = _captured_steps(context, rows, adapted, buckets, examples, capture)
    if steps is None:
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


def _planned_shapes(
    spec: JobSpec, rows: TrainingRows
) -> tuple[dict[PackedShape, list[int]], list[PackedShape]]:
    """The rows of a batch of each shape, and the shapes of all batches that the training will have;
    of a long training, of the first ones."""
    batches = planned_batches(planned_sampler(spec, rows, padding_free=True), spec.train)
    examples: dict[PackedShape, list[int]] = {}
    shapes: list[PackedShape] = []
    for batch in at_most(MAX_ROWS, batches):
        numbers = [max(row, 0) for row in batch]  # a dummy row is a copy of the first one
        shapes.append(rows.filtered.sizes.shape(numbers))
        examples.setdefault(shapes[-1], numbers)
    return examples, shapes


def _captured_steps(
    context: TrainContext,
    rows: TrainingRows,
    adapted: AdaptedModel,
    buckets: Buckets,
    examples: Mapping[PackedShape, Sequence[int]],
    capture: Capture | None,
) -> CapturedSteps | None:
    """The captured passes, one for each bucket; None, with a warning, if any process fails."""

    def inputs(rows_of_batch: Sequence[int], bucket: PackedShape | None) -> Inputs:
        encoded = [rows.dataset.row(row) for row in rows_of_batch]
        packed = context.family.pack(encoded, bucket)
        return cast(Inputs, dict(to_device(packed, context.engine.device)))

    without_images = next((batch for shape, batch in examples.items() if not shape.images), None)
    steps: CapturedSteps | None = None
    failure = "it failed in another process"
    try:
        steps = CapturedSteps(
            adapted.model.train(),
            [
                inputs(next(b for s, b in examples.items() if s.fits(bucket)), bucket)
                for bucket in buckets.shapes
            ],
            without_images=None if without_images is None else inputs(without_images, None),
            capture=capture,
        )
    except CaptureFailed as error:
        failure = str(error)
    if not process_group.any_rank(steps is None):
        return steps
    if steps is not None:
        steps.release()
    release_memory()
    log.warn("passes are not captured as graphs", reason=failure)
    return None
