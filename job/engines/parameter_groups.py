"""Parameter groups of the optimizer, if not all weights are trained at one learning rate.

As PEFT's `create_loraplus_optimizer` divides them: the B matrices of adapters, and vectors such as
biases and DoRA's magnitudes, are trained at `loraplus_lr_ratio` times the learning rate of the
others. Weight decay is that of the spec for all of them except biases and norms, as in
Transformers. The weights of the vision tower may have a learning rate of their own.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.families.vision_tower import vision_tower_pattern
from job.spec.types import TrainSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

NAME = "name"
"""Key of a group's name in the optimizer."""
BASE, VISION_TOWER, LORA_B = "base", "vision_tower", "lora_B"


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Peak learning rates by group of weights."""

    base: float
    vision_tower: float | None = None
    """None uses `base`."""
    loraplus_lr_ratio: float | None = None
    """None uses 1."""

    @classmethod
    def of(cls, train: TrainSpec) -> "LearningRates | None":
        """The spec's; None if all weights have the same."""
        if train.vision_tower_lr is None and train.loraplus_lr_ratio is None:
            return None
        return cls(
            base=train.learning_rate,
            vision_tower=train.vision_tower_lr,
            loraplus_lr_ratio=train.loraplus_lr_ratio,
        )

    def group_of(self, name: str, parameter: "torch.nn.Parameter", *, vision: bool) -> str:
        """The name of the parameter's group; `name` is its name in the model."""
        of_vision = vision and self.vision_tower is not None
        is_up = self.loraplus_lr_ratio is not None and ("lora_B" in name or parameter.ndim == 1)
        return "_".join([VISION_TOWER] * of_vision + [LORA_B] * is_up) or BASE

    def rate_of(self, group: str) -> float:
        """The peak learning rate of a group."""
        own = self.vision_tower if group.startswith(VISION_TOWER) else None
        rate = self.base if own is None else own
        return rate * (self.loraplus_lr_ratio or 1.0) if group.endswith(LORA_B) else rate


def parameter_groups(
    model: "PreTrainedModel | PeftModel",
    rates: LearningRates,
    *,
    weight_decay: float,
    decayed: Collection[str],
) -> list[dict[str, Any]]:
    """The optimizer's groups, those at the base rate first; none is empty.

    `decayed` names the parameters to which weight decay applies.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    pattern = None if rates.vision_tower is None else vision_tower_pattern(base)
    in_tower = {
        id(parameter)
        for name, parameter in base.named_parameters()
        if pattern is not None and pattern.match(name)
    }
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = rates.group_of(name, parameter, vision=id(parameter) in in_tower)
            groups.setdefault((group, name in decayed), []).append(parameter)
    order = (BASE, VISION_TOWER, LORA_B, f"{VISION_TOWER}_{LORA_B}")
    return [
        {
            "params": groups[group, decays],
            "lr": rates.rate_of(group),
            "weight_decay": weight_decay if decays else 0.0,
            NAME: group,
        }
        for group in order
        for decays in (True, False)
        if (group, decays) in groups
    ]


def rates_by_group(optimizer: "torch.optim.Optimizer") -> dict[str, float]:
    """The current learning rate of each named group; empty if all weights have the same."""
    return {group[NAME]: float(group["lr"]) for group in optimizer.param_groups if NAME in group}
