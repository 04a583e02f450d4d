"""The auxiliary load-balancing loss of routed experts, in Transformers' models.

Depending on the class, a configuration flag enables it, an argument of `forward`, or nothing.
Its weight is an attribute of the model or of its configuration.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from job.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import ModelOutput

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""The attributes that hold the weight."""
PER_CALL = ("glm4v_moe", "jetmoe", "qwen3_5_moe", "qwen3_vl_moe", "qwen4_exp")
"""Model types that add the loss if `forward` is called with `output_router_logits`. A test compares
the list with Transformers' classes."""


def set_aux_loss(model: "PreTrainedModel", coefficient: float | None) -> None:
    """Sets the auxiliary loss's weight; None keeps the model's own, 0 turns the loss off.

    Raises SpecError if the model does not compute that loss.
    """
    text = model.config.get_text_config()
    attribute = next((name for name in COEFFICIENTS if hasattr(model, name)), None)
    per_call = model.config.model_type in PER_CALL
    if attribute is not None or per_call:
        owner, name = (text, COEFFICIENTS[0]) if attribute is None else (model, attribute)
        if coefficient is not None:
            setattr(owner, name, float(coefficient))  # configurations accept no integers
        enabled = getattr(owner, name) != 0
        text.output_router_logits = enabled
        if per_call:
            _set_per_call(model, enabled=enabled)
    elif coefficient:
        raise SpecError(
            "$.train.router_aux_loss_coef",
            f"weights a loss that Transformers' {type(model).__name__} does not compute",
            value=coefficient,
            fix="remove the line",
        )


@contextmanager
def without_aux_loss(model: "PreTrainedModel") -> Iterator[None]:
    """A context in which the model's loss is the cross-entropy alone.

    For evaluation mode: in training mode, models of `PER_CALL` add the auxiliary loss regardless.
    """
    text = model.config.get_text_config()
    enabled = getattr(text, "output_router_logits", False)
    if enabled:
        text.output_router_logits = False
    try:
        yield
    finally:
        if enabled:
            text.output_router_logits = enabled


def _set_per_call(model: "PreTrainedModel", *, enabled: bool) -> None:
    """Makes training forward passes add the loss, or stop adding it.

    Replaces the instance's `forward`, because PEFT calls that directly, bypassing hooks.
    """
    if isinstance(vars(model).get("forward"), _ForwardWithRouterLogits):
        del model.forward
    if enabled:
        model.forward = _ForwardWithRouterLogits(model)


class _ForwardWithRouterLogits:
    """A model's `forward` that requests router logits in training mode."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self._model, self._forward = model, model.forward
        # Generation and the Trainer inspect the signature.
        self.__wrapped__ = model.forward

    def __call__(self, *args: object, **batch: object) -> "ModelOutput":
        if self._model.training:
            batch = {"output_router_logits": True, **batch}
        return self._forward(*args, **batch)
