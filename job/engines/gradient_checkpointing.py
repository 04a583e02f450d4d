"""Gradient checkpointing: activations are computed again for the backward pass, not kept."""

from typing import Any


def turn_on(model: Any) -> None:
    """Has each of the model's blocks keep its input alone."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    leave_frozen_parts(model)


def leave_frozen_parts(model: Any) -> None:
    """Lets no gradient be computed where nothing is trained.

    Transformers has every embedding ask for one, that of pictures too, as the reentrant kind of
    checkpointing needs: a frozen vision tower would be computed again, and backward, for nothing.
    """
    model.disable_input_require_grads()
