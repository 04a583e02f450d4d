"""Log-probabilities of answers, and the entropies of their tokens, by the model as it is now.

B answers of at most C tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from job.families.base import Family
from job.families.batches import model_inputs, to_device
from job.families.encoded import IGNORED, Encoded
from job.families.token_scores import token_scores
from job.reinforce.prompts import Prompts
from job.train.adapting import AdaptedModel


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers in the order of a pass."""

    rows: Sequence[int]
    """The row that each answers."""
    tokens: torch.Tensor
    """(B, C)"""
    present: torch.Tensor
    """(B, C): 0 for padding."""

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, numbers: Sequence[int]) -> "Answers":
        chosen = list(numbers)
        return Answers(
            rows=[self.rows[number] for number in chosen],
            tokens=self.tokens[chosen],
            present=self.present[chosen],
        )


@dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """Runs an adapted model on prompts and answers to them."""

    adapted: AdaptedModel
    family: Family
    prompts: Prompts
    temperature: float
    autocast: Callable[[], AbstractContextManager[None]]

    def of_all(self, answers: Answers, at_once: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies (B, C); 0 where no token is present."""
        count = len(answers)
        parts = [
            self._of(answers.part(range(begin, min(begin + at_once, count))))
            for begin in range(0, count, at_once)
        ]
        scores, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        return scores, entropies

    def of_some(
        self, answers: Answers, chosen: torch.Tensor, sampled: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `of_all`, but only the `chosen` (B,) are computed; each of them has a token.

        Others have the log-probabilities (B, C) that they were `sampled` with, if these are known:
        their ratio is 1, without a gradient. Their entropies are the mean of the computed ones, so
        that a mean over all is that of the computed ones; NaN if there are none.
        """
        unknown = torch.zeros(answers.tokens.shape, device=answers.tokens.device)
        scores = unknown if sampled is None else sampled
        numbers = chosen.nonzero()[:, 0]
        if not len(numbers):
            return scores, torch.full_like(unknown, torch.nan)
        part = answers.part(numbers.tolist())
        found, uncertain = self._of(part)
        mean = uncertain[part.present.bool()].mean()
        return (
            scores.index_copy(0, numbers, found),
            mean.expand_as(unknown).index_copy(0, numbers, uncertain),
        )

    def _of(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = [
            answered(self.prompts.encoded(row), tokens[mask.bool()].tolist())
            for row, tokens, mask in zip(answers.rows, answers.tokens, answers.present, strict=True)
        ]
        filled = answers.present.bool()
        scores = torch.zeros(filled.shape, device=filled.device)
        entropies = torch.zeros_like(scores)
        if not filled.any():
            return scores, entropies
        adapted, family = self.adapted, self.family
        # The answers to a row show the same images.
        packed = adapted.padding_free
        batch = family.pack(encoded, images_once=True) if packed else family.collate(encoded)
        inputs = to_device(model_inputs(dict(batch)), filled.device)
        with self.autocast():
            found, uncertain = token_scores(adapted.model, adapted.base, inputs, self.temperature)
        return scores.masked_scatter(filled, found), entropies.masked_scatter(filled, uncertain)


def answered(prompt: Encoded, answer: Sequence[int]) -> Encoded:
    """The prompt with an answer, whose tokens are labelled."""
    return replace(
        prompt,
        input_ids=(*prompt.input_ids, *answer),
        labels=(*(IGNORED for _ in prompt.input_ids), *answer),
    )
