"""The auxiliary loss that balances routed experts, in models of Transformers.

Its classes add it to the loss where the configuration says so, or where the call asks for it, or
never. Its weight is the model's or the configuration's.
"""

from typing import TYPE_CHECKING, Any

from job.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELD = ("router_aux_loss_coef", "aux_loss_coef")
"""The weight's name in models that hold it."""
ASKED = ("glm4v_moe", "jetmoe", "qwen3_5_moe", "qwen3_vl_moe", "qwen4_exp")
"""Model types whose forward pass adds it where `output_router_logits` is among its arguments. A
test holds them against Transformers' own classes."""


def set_aux_loss(model: "PreTrainedModel", coefficient: float | None) -> None:
    """Adds the auxiliary loss to the loss; None is the model's own weight, 0 off.

    Raises SpecError for a weight of a loss that the model does not compute.
    """
    text: Any = model.config.get_text_config()
    held = next((name for name in HELD if hasattr(model, name)), None)
    asked = model.config.model_type in ASKED
    if held is not None or asked:
        holder, name = (model, held) if held is not None else (text, HELD[0])
        if coefficient is not None:
            setattr(holder, name, float(coefficient))  # configurations take no whole numbers
        wanted = getattr(holder, name) != 0
        text.output_router_logits = wanted
        if asked:
            _ask(model, wanted=wanted)
    elif coefficient:
        raise SpecError(
            "$.train.router_aux_loss_coef",
            f"weighs a loss that {type(model).__name__} of Transformers does not compute",
            value=coefficient,
            fix="remove the line",
        )


def _ask(model: Any, *, wanted: bool) -> None:
    """Has each forward pass that trains compute it, or none.

    Set on the model itself: PEFT calls its `forward`, and no hooks.
    """
    asking = vars(model).get("forward")
    if isinstance(asking, _Asking):
        del model.forward
    if wanted:
        model.forward = _Asking(model)


class _Asking:
    """A model's forward pass that is asked for the routers' logits."""

    def __init__(self, model: Any) -> None:
        self._model, self._forward = model, model.forward
        # Generation, and what decides which columns a model takes, read the signature.
        self.__wrapped__ = model.forward

    def __call__(self, *args: Any, **batch: Any) -> Any:
        if self._model.training:
            batch = {"output_router_logits": True, **batch}
        return self._forward(*args, **batch)
