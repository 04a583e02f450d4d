"""Engines load models, attach adapters and run training steps; `choose` selects one.

Imports: spec, storage, distributed, local, families.
"""

from job.engines.base import Engine
from job.engines.choice import EngineChoice, EngineName, choose
from job.engines.device import (
    Accelerator,
    four_bit_settings,
    require_four_bit,
    resolve_autocast,
    resolve_dtype,
)
from job.engines.transformers import TransformersEngine
from job.spec.types import LoraSpec, ModelSpec

__all__ = ["Engine", "EngineChoice", "EngineName", "choose", "create"]


def create(model: ModelSpec, lora: LoraSpec, accelerator: Accelerator) -> Engine:
    """The engine that the spec names; an unresolved `auto` means transformers.

    Raises SpecError if it needs a package that is not installed. For Unsloth,
    `job.engines.unsloth_patches` must have imported the library.
    """
    require_four_bit(model)
    _quiet_libraries()
    dtype = resolve_dtype(model, lora, accelerator)
    autocast, device = resolve_autocast(model, lora, accelerator), accelerator.device
    if model.engine == "unsloth":
        import torch

        from job.engines.unsloth import UnslothEngine

        # Without autocast its LoRA layers compute in the adapter's fp32.
        autocast = dtype == torch.bfloat16
        return UnslothEngine(model=model, dtype=dtype, autocast=autocast, device=device)
    return TransformersEngine(
        model=model,
        dtype=dtype,
        autocast=autocast,
        device=device,
        four_bit=four_bit_settings(model, lora),
    )


def _quiet_libraries() -> None:
    """Silences progress bars and warnings that would garble the job's own log."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
