"""The cross-entropy of the supervised tokens; computes no logits of other tokens.

H is the hidden size, V the vocabulary's, S the number of supervised tokens.
"""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy, linear, log_softmax
from torch.utils.checkpoint import checkpoint

from job.families.autograd import Context
from job.families.encoded import IGNORED

CHUNK = 2048
"""Tokens whose logits are in memory at a time: 0.8 GiB in fp32 with a vocabulary of 103,424."""


def supervised_loss(
    hidden: torch.Tensor, targets: torch.Tensor, head: torch.nn.Module
) -> torch.Tensor:
    """The mean loss, an fp32 scalar, from hidden states (S, H) and targets (S,).

    Targets that are `IGNORED` do not count. With a frozen head, no logits are saved for the
    backward pass. With a trained one, they are recomputed there, if there is more than one chunk. A
    sharded head (FSDP2) is called once and its logits are saved: each call is a collective, and
    ranks differ in their number of chunks.
    """
    count = (targets != IGNORED).sum()
    if is_frozen(head):
        if not torch.is_grad_enabled():
            assert isinstance(head, torch.nn.Linear)
            return _frozen_head_loss(hidden, targets, head.weight) / count
        return _FrozenHeadLoss.apply(hidden, targets, head.weight) / count
    if len(targets) <= CHUNK or isinstance(head, FSDPModule):
        return _sum(hidden, targets, head) / count
    total = hidden.new_zeros((), dtype=torch.float32)
    for hidden_chunk, target_chunk in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(_sum, hidden_chunk, target_chunk, head, use_reentrant=False)
    return total / count


def is_frozen(head: torch.nn.Module) -> bool:
    """Whether the head is a plain, frozen matrix."""
    return type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad


def _sum(hidden: torch.Tensor, targets: torch.Tensor, head: torch.nn.Module) -> torch.Tensor:
    return cross_entropy(head(hidden).float(), targets, reduction="sum")


def _frozen_head_loss(
    hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The summed loss without a gradient, as `_FrozenHeadLoss` computes it."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for hidden_chunk, target_chunk in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = linear(hidden_chunk.to(weight.dtype), weight)  # (C, V)
        log_probabilities = log_softmax(logits, dim=-1, dtype=torch.float32)
        index = target_chunk.clamp(min=0)[:, None]  # (C, 1)
        of_targets = log_probabilities.gather(1, index)[:, 0]  # (C,)
        total -= of_targets.masked_fill(target_chunk == IGNORED, 0).sum()
    return total


def _loss_and_gradient(
    hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """The summed loss of a chunk of C tokens; fills `gradient` (C, H). Frees the logits."""
    logits = linear(hidden.to(weight.dtype), weight)  # (C, V)
    log_probabilities = log_softmax(logits, dim=-1, dtype=torch.float32)  # (C, V)
    index, ignored = targets.clamp(min=0)[:, None], (targets == IGNORED)[:, None]  # (C, 1) each
    of_targets = log_probabilities.gather(1, index)  # (C, 1)
    # d loss / d logits = softmax - onehot(target), written in place of the logits, which also
    # rounds it to their dtype.
    slopes = torch.exp(log_probabilities, out=logits)
    slopes.scatter_(1, index, of_targets.expm1().to(slopes.dtype))
    gradient.copy_((slopes @ weight).masked_fill_(ignored, 0))
    return -of_targets.masked_fill(ignored, 0).sum()


class _FrozenHeadLoss(torch.autograd.Function):
    """The summed loss of (S, H), (S,) and a frozen head (V, H), with its gradient computed forward.

    Instead of the logits, only the gradient of the hidden states is saved, which is far smaller.
    """

    @staticmethod
    def forward(
        ctx: Context, hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)  # (S, H)
        chunks = (tensor.split(CHUNK) for tensor in (hidden, targets, gradient))
        for hidden_chunk, target_chunk, gradient_chunk in zip(*chunks, strict=True):
            total += _loss_and_gradient(hidden_chunk, target_chunk, weight, gradient_chunk)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Context, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # In fp32: rounding the factor alone to bf16 would be an error of up to 0.4%.
        return (gradient.float() * grad).to(gradient.dtype), None, None
