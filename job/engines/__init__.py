"""Engines load, adapt and train a model; `create` chooses one for the machine."""

from job.engines.base import Engine
from job.engines.device import Accelerator, resolve_autocast, resolve_dtype
from job.engines.transformers import TransformersEngine
from job.spec.types import LoraSpec, ModelSpec


def create(model: ModelSpec, lora: LoraSpec, accelerator: Accelerator) -> Engine:
    """The engine that the spec names; `auto` is the plain one."""
    _quiet_libraries()
    return TransformersEngine(
        model=model,
        dtype=resolve_dtype(model, lora, accelerator),
        autocast=resolve_autocast(model, lora, accelerator),
        device=accelerator.device,
    )


def _quiet_libraries() -> None:
    """The job has its own bars and log; the libraries' would break their lines."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
