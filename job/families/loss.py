"""Cross-entropy of the supervised tokens alone."""

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy, linear, log_softmax
from torch.utils.checkpoint import checkpoint

CHUNK = 2048
"""Tokens whose logits are held at a time: 0.8 GiB in fp32 with a vocabulary of 103,424."""


def supervised_loss(
    hidden: torch.Tensor, targets: torch.Tensor, head: torch.nn.Module
) -> torch.Tensor:
    """The mean over S tokens, a scalar in fp32, from hidden states (S, H) and their targets (S,).

    Of a head that is not trained no logits stay for the backward pass. Of one that is, they are
    made again there where there is more than one chunk. A head in shares (FSDP2), trained or not,
    is asked once and its logits are kept: each time all processes gather it, and their numbers of
    chunks differ.
    """
    if is_frozen(head):
        return _FrozenHead.apply(hidden, targets, head.weight) / len(targets)
    if len(targets) <= CHUNK or isinstance(head, FSDPModule):
        return _sum(hidden, targets, head) / len(targets)
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(_sum, part, wanted, head, use_reentrant=False)
    return total / len(targets)


def is_frozen(head: torch.nn.Module) -> bool:
    """Whether the head is a matrix and nothing else, and not trained."""
    return type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad


def _sum(hidden: torch.Tensor, targets: torch.Tensor, head: torch.nn.Module) -> torch.Tensor:
    return cross_entropy(head(hidden).float(), targets, reduction="sum")


def _loss_and_gradient(
    hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """The sum over a chunk; fills `gradient` (C, H). Its logits are gone when it returns."""
    logits = linear(hidden.to(weight.dtype), weight)  # (C, V)
    scores = log_softmax(logits, dim=-1, dtype=torch.float32)
    places = targets[:, None]
    wanted = scores.gather(1, places)
    # The logits' room takes the probabilities: rounded by the way, not in a pass of its own.
    slopes = torch.exp(scores, out=logits)
    slopes.scatter_(1, places, wanted.expm1().to(slopes.dtype))
    gradient.copy_(slopes @ weight)
    return -wanted.sum()


class _FrozenHead(torch.autograd.Function):
    """The sum over S tokens from (S, H), (S,) and (V, H); its gradient is made along with it.

    All that the backward pass needs of the logits is the gradient of the hidden states, which is a
    small part of their size.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        parts = (tensor.split(CHUNK) for tensor in (hidden, targets, gradient))
        for part, wanted, room in zip(*parts, strict=True):
            total += _loss_and_gradient(part, wanted, weight, room)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # In fp32: rounded to bf16 the factor alone would be off by up to 0.4%.
        return (gradient.float() * grad).to(gradient.dtype), None, None
