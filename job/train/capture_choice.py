"""Decides whether passes can be captured as graphs, as far as the spec tells."""

from job.engines.device import is_plain, trains_weights
from job.spec.types import JobSpec


def why_eager(
    spec: JobSpec, *, on_gpu: bool, padding_free: bool, trial_obstacle: str | None = None
) -> str | None:
    """Why the passes cannot be captured; None if they can.

    `trial_obstacle` is why the trial of captures failed; None if it succeeded, or there was none.
    """
    train, lora = spec.train, spec.lora
    reasons = {
        "a CPU has no graphs": not on_gpu,
        "train.cuda_graphs is false": not train.cuda_graphs,
        "only the padding-free step can be captured": not padding_free,
        "FSDP2 communicates within a pass": spec.shards_weights,
        "only plain LoRA can be captured, without dropout or DoRA": trains_weights(lora)
        or not is_plain(lora),
        "train.neftune_noise_alpha draws noise in each pass": train.neftune_noise_alpha is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), trial_obstacle)
