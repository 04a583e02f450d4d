"""The engine protocol: an engine loads models on its device, and attaches adapters to them.

Every engine trains with the same `StepTrainer` (`job.engines.trainer`).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from job.families.base import Family
from job.families.four_bit import FourBit
from job.families.lora.target_groups import LoraTargets
from job.spec.types import LoraSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


class Engine(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> "torch.dtype":
        """The dtype of the weights in memory."""

    @property
    def autocast(self) -> bool:
        """Whether training computes in bf16 regardless of the weights' dtype."""

    @property
    def device(self) -> "torch.device": ...

    @property
    def four_bit(self) -> FourBit | None:
        """How frozen weights are packed; None if they are not."""

    @property
    def patches_forward(self) -> bool:
        """Whether it replaces the models' forward passes.

        If so, the family's packed step and this project's compiled blocks are not used: they would
        override the replacements.
        """

    def load(self, family: Family, dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
        """The family's model with the checkpoint's weights, on this engine's device.

        Frozen, in evaluation mode, and in this engine's dtype: in 4 bits if the spec says so. If
        another dtype is given, all weights have that.
        """

    def without_weights(self, family: Family) -> "PreTrainedModel":
        """The model of `load` with placeholders of the weights (`job.families.placeholders`)."""

    def initialize(self, family: Family, seed: int) -> "PreTrainedModel":
        """The family's architecture with seeded random weights."""

    def prepare(self, model: "PreTrainedModel", family: Family) -> "PreTrainedModel":
        """Freezes a model and selects the spec's experts implementation, as `load` does."""

    def attach_adapter(
        self, model: "PreTrainedModel", targets: LoraTargets, lora: LoraSpec, seed: int
    ) -> "PeftModel":
        """Adds a new, seeded adapter to the model; only the adapter is trainable."""

    def load_adapter(self, model: "PreTrainedModel", directory: Path) -> "PeftModel":
        """Adds a stored adapter to the model, in evaluation mode."""
