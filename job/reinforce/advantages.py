"""Which answers of a pass the model learns from, by their advantages."""

from collections.abc import Mapping

import torch


def without_rounding_errors(advantages: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Advantages (N,) in the order of the rows, with 0 for answers that were all rewarded alike.

    The mean of equal rewards may differ from each by a rounding error, which the division by their
    standard deviation makes larger.
    """
    groups = advantages.view(-1, num_generations)
    equal = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return groups.masked_fill(equal, 0).flatten()


def equal_group_share(advantages: torch.Tensor, num_generations: int) -> float:
    """The share of rows whose answers were all rewarded alike, 0 to 1.

    `advantages` (N,) are those of `without_rounding_errors`.
    """
    return float((advantages.view(-1, num_generations) == 0).all(dim=1).float().mean())


def affecting_gradient(inputs: Mapping[str, torch.Tensor], beta: float) -> torch.Tensor:
    """Flags (B,) the answers of a pass that affect the gradient of its loss.

    The loss of a token is -min(r, clip(r)) · advantage, with the ratio r of its probabilities now
    and when it was sampled, plus `beta` times the divergence: without both, it is constant.

    `inputs` are TRL's: advantages (B,), and the completion_mask (B, C) of at most C tokens.
    """
    counted = inputs["completion_mask"].any(dim=1)  # TRL may mask answers that were cut short
    return counted if beta else counted & (inputs["advantages"] != 0)
