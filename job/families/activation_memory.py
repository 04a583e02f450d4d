"""What a family reports about the memory of a training step, and what it has to know for that."""

from dataclasses import dataclass

VARLEN = "varlen"
"""PyTorch's variable-length attention, in `StepSettings.attention`; a spec cannot name it."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The settings of a training step that its memory depends on."""

    itemsize: int
    """Bytes of an activation's element."""
    autocast: bool
    packed: bool
    checkpointing: bool
    attention: str
    experts: str
    rank: int
    """The adapter's; 0 in full fine-tuning."""
    lora_linear: bool
    """Whether adapted layers are `LoraLinear`, which copies no input; else PEFT's own."""
    dropout: int = 0
    """Bytes of the dropout mask for each element: 1 on a GPU, an element's own size on a CPU."""


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """Bytes that a step needs beside weights, gradients and optimizer state."""

    activations: int
    attention: int
    log_probabilities: int
    """What the forward pass saves of the logits."""
    logits: int
    """The logits and everything that their backward pass adds."""
    recomputed: int
    """The largest block that gradient checkpointing computes again."""
    workspace: int
    """Temporary tensors of the largest layer."""

    @property
    def after_forward(self) -> int:
        """What is saved once the forward pass is over."""
        return self.activations + self.attention + self.log_probabilities
