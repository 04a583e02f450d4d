"""Metrics of generated answers during training: those of the evaluation, on validation rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from job.evaluation import answer_lengths
from job.evaluation.generate import BatchSize, generate_all, to_texts
from job.evaluation.prompts import questions
from job.evaluation.scoring import score_answers
from job.families.base import Family
from job.prep.rows import Row
from job.spec.types import EvalSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ValidationAnswers:
    """Generates and scores answers to validation rows; `train` calls it in every process."""

    family: Family
    spec: EvalSpec
    max_new_tokens: int
    """The limit for all rows: it must not depend on how they are divided among processes."""
    batch_size: BatchSize

    @classmethod
    def of(
        cls, family: Family, spec: EvalSpec, rows: Sequence[Row], *, batch_size: BatchSize
    ) -> "ValidationAnswers":
        """For the first `eval.validation_samples` of the rows."""
        rows = [rows[n] for n in range(min(len(rows), spec.validation_samples))]
        thinks = spec.generation.enable_thinking
        written = [question.written(thinks=thinks) for question in questions(rows, spec.turns)]
        lengths = answer_lengths.tokens(family.processor.tokenizer, written)
        return cls(
            family=family,
            spec=spec,
            max_new_tokens=answer_lengths.limit(spec.generation, lengths),
            batch_size=batch_size,
        )

    def generate(
        self, model: "PreTrainedModel", rows: Sequence[Row], stop: Callable[[], bool]
    ) -> list[str]:
        """The answers to all questions of the rows; incomplete if `stop` became true."""
        import torch

        torch.manual_seed(0)  # as in the evaluation
        tokens = generate_all(
            model,
            self.family,
            questions(rows, self.spec.turns),
            replace(self.spec.generation, max_new_tokens=self.max_new_tokens),
            batch_size=self.batch_size,
            stop=stop,
        )
        return to_texts(self.family, tokens, thinks=self.spec.generation.enable_thinking)

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, float]:
        """The metrics of the answers to all questions of the rows, by name."""
        labels = [question.label for question in questions(rows, self.spec.turns)]
        return score_answers(self.spec.answer, answers, labels, self.spec.measured).metrics
