"""The memory of a training step as a family estimates it, and the settings that it depends on."""

from dataclasses import dataclass

VARLEN = "varlen"
"""PyTorch's variable-length attention, in `StepSettings.attention`; a spec cannot name it."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The settings that the memory of a training step depends on."""

    itemsize: int
    """Bytes per element of an activation."""
    autocast: bool
    packed: bool
    checkpointing: bool
    attention: str
    experts: str
    rank: int
    """The adapter's rank; 0 in full fine-tuning."""
    gate_up_adapters: int = 1
    """Adapters in a fused parameter of gate and up: 2 if each has one."""
    lora_linear: bool
    """Whether adapted layers are `LoraLinear`, which does not copy its input; else PEFT's."""
    dropout: int = 0
    """Bytes per element of the dropout mask: 1 on a GPU, the element's own size on a CPU."""


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """Bytes that a step needs in addition to weights, gradients and optimizer state."""

    activations: int
    attention: int
    log_probabilities: int
    """Log-probabilities that the forward pass saves."""
    logits: int
    """The logits and everything that their backward pass adds."""
    recomputed: int
    """The largest block that gradient checkpointing recomputes."""
    workspace: int
    """Temporary tensors of the largest layer."""

    @property
    def after_forward(self) -> int:
        """Everything saved at the end of the forward pass."""
        return self.activations + self.attention + self.log_probabilities
