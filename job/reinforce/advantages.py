"""Which answers of a pass can teach anything, by their advantages."""

from collections.abc import Mapping

import torch


def without_rounding(advantages: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Advantages (N,) in the order of the rows, with 0 for answers that were all rewarded alike.

    The mean of equal rewards may differ from each by a rounding error, which the division by their
    standard deviation makes larger.
    """
    groups = advantages.view(-1, num_generations)
    alike = (groups == groups[:, :1]).all(dim=1, keepdim=True)
    return groups.masked_fill(alike, 0).flatten()


def share_alike(advantages: torch.Tensor, num_generations: int) -> float:
    """The share of rows whose answers were all rewarded alike, by advantages `without_rounding`."""
    return float((advantages.view(-1, num_generations) == 0).all(dim=1).float().mean())


def teaching(inputs: Mapping[str, torch.Tensor], beta: float) -> torch.Tensor:
    """Flags (B,) the answers of a pass on which the gradient of its loss depends.

    The loss of a token is -min(r, clip(r)) · advantage, with the ratio r of its probabilities now
    and when it was sampled, plus `beta` times the divergence: nothing without both.
    """
    learned = inputs["completion_mask"].any(dim=1)  # not if it was cut, and is masked for it
    return learned if beta else learned & (inputs["advantages"] != 0)
