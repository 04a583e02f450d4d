"""Training of Transformers' own models without logits of tokens that are not supervised.

Their forward passes make logits of all tokens, padding too, and keep them in fp32: with 150,000
words that is more than all else that a step keeps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from job.families.base import IGNORED
from job.families.loss import is_frozen, supervised_loss

PLAIN = ("idefics3", "llama", "qwen2_5_vl", "qwen3")
"""Model types whose loss is the cross-entropy of one linear layer with nothing behind it. Each of
them is held against Transformers' loss by a test; others may scale or cap their logits."""


@contextmanager
def supervised_alone(model: Any) -> Iterator[bool]:
    """Within, a training step's loss is made from hidden states, of supervised tokens alone.

    Gives whether it is: for the types above, where the head is not trained. A model in evaluation
    mode computes what it always does.
    """
    head = model.get_output_embeddings()
    if model.config.model_type not in PLAIN or head is None or not is_frozen(head):
        yield False
        return
    plain_loss = model.loss_function

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, H) as it is, for the loss, or logits (B, T, V)."""
        return hidden if head.training else torch.nn.Linear.forward(head, hidden)

    def loss_function(logits: torch.Tensor, labels: torch.Tensor, **more: Any) -> torch.Tensor:
        """The mean over supervised tokens, from hidden states (B, T, H) and labels (B, T)."""
        if not head.training:
            return plain_loss(logits=logits, labels=labels, **more)
        targets = labels[:, 1:].flatten()  # of each token the one after it
        places = (targets != IGNORED).nonzero()[:, 0]
        hidden = logits[:, :-1].flatten(0, 1)
        return supervised_loss(hidden[places], targets[places], head)

    head.forward, model.loss_function = forward, loss_function
    try:
        yield True
    finally:
        del head.forward
        model.loss_function = plain_loss
