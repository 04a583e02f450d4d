"""Cross-entropy of the supervised tokens alone."""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK = 2048
"""Tokens whose logits are held at a time: 0.8 GiB in fp32 with a vocabulary of 103,424."""


def supervised_loss(
    hidden: torch.Tensor, targets: torch.Tensor, head: torch.nn.Module
) -> torch.Tensor:
    """The mean over S tokens, a scalar in fp32, from hidden states (S, H) and their targets (S,).

    Where there is more than one chunk its logits are made again in the backward pass. A head in
    shares is asked once: each time all processes gather it, and their numbers of chunks differ.
    """
    if len(targets) <= CHUNK or isinstance(head, FSDPModule):
        return _sum(hidden, targets, head) / len(targets)
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(_sum, part, wanted, head, use_reentrant=False)
    return total / len(targets)


def _sum(hidden: torch.Tensor, targets: torch.Tensor, head: torch.nn.Module) -> torch.Tensor:
    return cross_entropy(head(hidden).float(), targets, reduction="sum")
