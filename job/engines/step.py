"""The `Trainer` of the plain engine."""

from typing import Any

from transformers import Trainer

from job.families.base import host_keys


class StepTrainer(Trainer):
    """Transformers' own, which moves whole batches, but for what belongs to the host."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        # One copy back; read on the device, each value would be one.
        host = host_keys(prepared)
        return {k: v.cpu() if k in host else v for k, v in prepared.items()}
