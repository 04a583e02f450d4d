"""Log-probabilities of given tokens, and the entropy of the choices, by any family's model.

The logits of other tokens are not computed: the output layer sees the selected positions only.
B rows, T tokens, S selected positions, V the vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import log_softmax

from job.families.encoded import IGNORED

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ENTROPY_ROWS = 64


def token_scores(
    model: "PreTrainedModel | PeftModel",
    base: "PreTrainedModel",
    batch: Mapping[str, Any],
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities (S,) of the labelled tokens, row by row, and the entropies (S,).

    `batch` is a training batch on the model's device, packed or padded, and `base` the model inside
    the adapter. Both are fp32 and of the distribution at `temperature`; entropies have no gradient.
    """
    packed: torch.Tensor | None = batch.get("targets")  # (S,)
    if packed is not None:
        logits, targets = model(**batch, returns_logits=True).logits, packed
    else:
        inputs = dict(batch)
        successors = inputs.pop("labels")[:, 1:]  # (B, T - 1): each token predicts its successor
        rows, columns = (successors != IGNORED).nonzero(as_tuple=True)
        with _selected_logits(base, rows, columns):
            logits = model(**inputs, use_cache=False).logits  # (1, S, V)
        targets = successors[rows, columns]  # (S,)
    log_probabilities = log_softmax(logits[0].float() / temperature, dim=-1)  # (S, V)
    of_targets = log_probabilities.gather(1, targets[:, None])[:, 0]
    return of_targets, _entropies(log_probabilities.detach())


def _entropies(log_probabilities: torch.Tensor) -> torch.Tensor:
    """(S,) of (S, V), some rows at a time: two more tensors of that size would be the peak."""
    parts = [-(part.exp() * part).sum(-1) for part in log_probabilities.split(ENTROPY_ROWS)]
    return torch.cat(parts)


@contextmanager
def _selected_logits(
    base: "PreTrainedModel", rows: torch.Tensor, columns: torch.Tensor
) -> Iterator[None]:
    """A context in which the output layer maps (B, T, H) to the logits (1, S, V) of positions."""
    head = base.get_output_embeddings()
    assert head is not None, "a model that generates has an output layer"
    own = vars(head).get("forward")
    original = head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = original(hidden[rows, columns][None])
        return logits

    head.forward = forward
    try:
        yield
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own
