"""Engines load, adapt and train a model; `create` chooses one for the machine."""

from job.engines.base import Engine
from job.engines.device import Accelerator, resolve_dtype
from job.engines.transformers import TransformersEngine
from job.spec.types import ModelSpec


def create(model: ModelSpec, accelerator: Accelerator) -> Engine:
    """The engine that the spec names; `auto` is the plain one."""
    return TransformersEngine(
        model=model, dtype=resolve_dtype(model, accelerator), device=accelerator.device
    )
