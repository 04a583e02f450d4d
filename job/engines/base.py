"""The seam between the job and what loads, adapts and trains a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from job.families.base import Family, LoraTargets
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer


class Engine(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> "torch.dtype": ...

    @property
    def autocast(self) -> bool:
        """Whether training computes in bf16 whatever the weights' dtype."""

    @property
    def device(self) -> "torch.device": ...

    @property
    def brings_forward(self) -> bool:
        """Whether it puts forward passes of its own into a model.

        The family's packed step, and blocks that this project compiles, would take their place.
        """

    def load(self, family: Family, dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
        """The family's checkpoint on this engine's device, frozen and in evaluation mode.

        In this engine's dtype unless another is asked for.
        """

    def initialise(self, family: Family, seed: int) -> "PreTrainedModel":
        """The family's architecture with seeded random weights."""

    def prepare(self, model: "PreTrainedModel", family: Family) -> "PreTrainedModel":
        """A model in hand as `load` gives it: frozen, with the experts that the spec names."""

    def attach_adapter(
        self, model: "PreTrainedModel", targets: LoraTargets, lora: LoraSpec, seed: int
    ) -> "PeftModel":
        """A new, seeded adapter on the model; only the adapter is trainable."""

    def load_adapter(self, model: "PreTrainedModel", directory: Path) -> "PeftModel":
        """A stored adapter on the model, in evaluation mode."""

    def trainer_class(self) -> type["Trainer"]:
        """The `Trainer` that runs this engine's step."""
