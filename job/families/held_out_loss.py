"""The loss of held-out rows: the mean over the supervised tokens of all rows, without gradients.

Validations during training and the evaluations before and after it measure the same, with the same
batches: packed if the family can, longest rows first, and without auxiliary losses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

from job.families.base import Family
from job.families.batches import Batch, model_inputs, to_device
from job.families.encoded import Encoded
from job.families.load_balancing import without_aux_loss
from job.families.lookahead import computed_ahead
from job.families.supervised_logits import evaluates_loss_only, supervised_logits_only

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LOSS_TOKENS = 8192
"""Tokens of a packed batch on a GPU, where a small forward pass takes as long as a large one; fewer
if they do not fit. Without saved activations, a token needs little memory."""
AUTO_ROWS = 8
"""Rows of other batches if the spec leaves it to the job: padding and its logits take memory."""
LOADING_THREADS = 4
"""Threads that build batches while a GPU computes earlier ones."""


def rows_of_a_batch(requested: int | Literal["auto"]) -> int:
    """Rows of a batch by the spec's `per_device_eval_batch_size`."""
    return AUTO_ROWS if requested == "auto" else requested


def length_batches(lengths: Sequence[int], *, rows: int, tokens: int = 0) -> list[list[int]]:
    """Batches of row numbers, longest rows first: `rows` of them, or more up to `tokens`."""
    batches: list[list[int]] = []
    filled = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if not batches or (len(batches[-1]) >= rows and filled + lengths[row] > tokens):
            batches.append([])
            filled = 0
        batches[-1].append(row)
        filled += lengths[row]
    return batches


@contextmanager
def loss_evaluation(model: torch.nn.Module, base: "PreTrainedModel") -> Iterator[None]:
    """A context in which the model computes its loss in evaluation mode, for `SummedLoss`.

    `base` is the model inside an adapter. The model stays in evaluation mode.
    """
    model.eval()
    evaluates_loss_only(base)
    try:
        with torch.no_grad(), without_aux_loss(base):
            yield
    finally:
        model.eval()


class SummedLoss:
    """Adds up the loss of batches, in fp64 and on the device: no batch waits for it."""

    def __init__(self, model: torch.nn.Module, device: torch.device, *, packed: bool) -> None:
        self._model, self._device = model, device
        self._settings = {} if packed else {"use_cache": False}
        self._nll = torch.zeros((), dtype=torch.float64, device=device)
        self.supervised = 0

    def add(self, batch: Batch, supervised: int) -> None:
        """Adds a batch with `supervised` supervised tokens; 0 computes it without counting it.

        Raises an error of the device if the batch does not fit.
        """
        inputs = to_device(model_inputs(dict(batch)), self._device)
        loss = self._model(**inputs, **self._settings).loss  # ()
        if supervised:
            self._nll += loss.double() * supervised
            self.supervised += supervised

    @property
    def nll(self) -> float:
        """The sum over all supervised tokens."""
        return float(self._nll)


def held_out_loss(
    model: "PreTrainedModel | PeftModel",
    family: Family,
    encoded: Sequence[Encoded],
    *,
    rows: int | Literal["auto"],
    tokens: int,
) -> tuple[float, int]:
    """The summed loss of tokenized rows, and the number of their supervised tokens.

    Batches have `rows` rows, or more up to `tokens` if they are packed. Raises an error of the
    device if one does not fit.
    """
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    packed = family.try_packed_step(model)
    batches = length_batches(
        [len(row.input_ids) for row in encoded],
        rows=rows_of_a_batch(rows),
        tokens=tokens if packed else 0,
    )

    def built(numbers: Sequence[int]) -> Batch:
        batch = [encoded[number] for number in numbers]
        return family.pack(batch) if packed else family.collate(batch)

    device = base.device
    threads = 0 if device.type == "cpu" else LOADING_THREADS
    total = SummedLoss(model, device, packed=packed)
    with supervised_logits_only(base), loss_evaluation(model, base):
        for numbers, batch in zip(
            batches, computed_ahead(built, batches, threads=threads), strict=True
        ):
            total.add(batch, sum(encoded[number].supervised_tokens for number in numbers))
    return total.nll, total.supervised
