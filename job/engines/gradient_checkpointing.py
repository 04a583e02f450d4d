"""Gradient checkpointing: activations are recomputed for the backward pass instead of stored."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def enable(model: "PreTrainedModel", *, draws: bool = True) -> None:
    """Makes each block of the model store only its input.

    `draws` tells whether blocks draw random numbers, for dropout: the recomputation then draws the
    same. It reads the device's random state, which cannot be captured as a graph.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": draws})
    skip_frozen_inputs(model)


def skip_frozen_inputs(model: "PreTrainedModel") -> None:
    """Skips the backward pass of parts in which nothing is trained.

    Transformers makes the output of every embedding, images included, require a gradient, as
    reentrant checkpointing needs: a frozen vision tower would be recomputed and run backward for
    nothing.
    """
    model.disable_input_require_grads()
