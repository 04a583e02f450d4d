"""Trains Transformers' own models without computing logits of unsupervised tokens.

Their forward passes compute logits of all tokens, including padding, and keep them in fp32: with a
vocabulary of 150,000 that is more than all other activations of a step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from job.families.encoded import IGNORED
from job.families.loss import is_frozen, supervised_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_TYPES = ("idefics3", "llama", "qwen2_5_vl", "qwen3")
"""Models whose loss is the cross-entropy of one linear layer; others may scale or cap their logits.
A test compares each with Transformers' loss."""


def evaluates_loss_only(model: "PreTrainedModel") -> None:
    """Makes a model in evaluation mode compute its loss as in training, inside
    `supervised_logits_only`; `model.eval()` undoes it. A linear head has no other use for the mode.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.training = True


@contextmanager
def supervised_logits_only(model: "PreTrainedModel") -> Iterator[bool]:
    """A context in which training computes logits of supervised tokens only.

    Yields whether it does so: only for `MODEL_TYPES` with a frozen head. If the head is in
    evaluation mode, the model computes all logits as usual, as generation needs;
    `evaluates_loss_only` also covers a model in evaluation mode.
    """
    head = model.get_output_embeddings()
    if model.config.model_type not in MODEL_TYPES or head is None or not is_frozen(head):
        yield False
        return
    original_loss = model.loss_function

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        """In training, passes the hidden states (B, T, H) through; else, logits (B, T, V)."""
        return hidden if head.training else torch.nn.Linear.forward(head, hidden)

    def loss_function(logits: torch.Tensor, labels: torch.Tensor, **more: object) -> torch.Tensor:
        """The mean loss of supervised tokens; in training, `logits` are hidden states (B, T, H)."""
        if not head.training:
            return original_loss(logits=logits, labels=labels, **more)
        targets = labels[:, 1:].flatten()  # each token predicts its successor
        supervised = (targets != IGNORED).nonzero()[:, 0]  # (S,)
        hidden = logits[:, :-1].flatten(0, 1)
        return supervised_loss(hidden[supervised], targets[supervised], head)

    head.forward, model.loss_function = forward, loss_function
    try:
        yield True
    finally:
        del head.forward
        model.loss_function = original_loss
