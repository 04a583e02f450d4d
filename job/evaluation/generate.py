"""Generates answers to held-out rows, greedy or sampled, and measures the loss."""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job import log
from job.evaluation.prompts import Question
from job.families.base import IGNORED, Encoded, Family
from job.families.batches import to_device
from job.prep.rows import Row
from job.spec.types import GenerationSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True, kw_only=True)
class GeneratedAnswers:
    """The model's answers, in the questions' order, and its loss on the labels."""

    texts: tuple[str, ...]
    cut_short: tuple[bool, ...]
    """Whether an answer reached max_new_tokens without an end token."""
    loss: float
    """Mean cross-entropy per token, over all answers of the rows."""
    generated_tokens: int


def generate_answers(
    model: "PreTrainedModel",
    family: Family,
    asked: Sequence[Question],
    rows: Sequence[Row],
    generation: GenerationSpec,
    *,
    batch_size: int,
    label: str,
) -> GeneratedAnswers:
    """Generates an answer to every question, and measures the loss on the rows' answers."""
    model.eval()
    texts: list[str] = []
    cut: list[bool] = []
    generated = 0
    with log.progress(label, len(asked), unit="answers") as bar:
        for tokens in generate_in_batches(model, family, asked, generation, batch_size=batch_size):
            generated += sum(len(row) for row in tokens)
            cut += [len(row) == generation.max_new_tokens for row in tokens]
            texts += to_texts(family, tokens)
            bar.advance(len(tokens))
    nll, supervised = 0.0, 0
    for start in range(0, len(rows), batch_size):
        encoded = [family.encode(row) for row in rows[start : start + batch_size]]
        batch_nll, batch_supervised = _summed_loss(model, family, encoded)
        nll, supervised = nll + batch_nll, supervised + batch_supervised
    return GeneratedAnswers(
        texts=tuple(texts),
        cut_short=tuple(cut),
        loss=nll / supervised if supervised else math.nan,
        generated_tokens=generated,
    )


def generate_in_batches(
    model: "PreTrainedModel",
    family: Family,
    asked: Sequence[Question],
    generation: GenerationSpec,
    *,
    batch_size: int,
    stop: Callable[[], bool] | None = None,
) -> Iterator[list[list[int]]]:
    """The tokens of the answers, batch by batch; ends early if `stop` becomes true."""
    for start in range(0, len(asked), batch_size):
        if stop is not None and stop():
            return
        prompts = [
            family.encode_prompt(
                question.id,
                question.asked,
                question.images,
                enable_thinking=generation.enable_thinking,
            )
            for question in asked[start : start + batch_size]
        ]
        yield generate(model, family, prompts, generation, stop=stop)


def to_texts(family: Family, answers: Sequence[Sequence[int]]) -> list[str]:
    tokenizer = family.processor.tokenizer
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in answers]


def generate(
    model: "PreTrainedModel",
    family: Family,
    prompts: Sequence[Encoded],
    generation: GenerationSpec,
    streamer: "BaseStreamer | None" = None,
    stop: Callable[[], bool] | None = None,
) -> list[list[int]]:
    """The tokens generated after each prompt, without end token and padding.

    `generation.max_new_tokens` must be a number. A `streamer` works with one prompt only. If `stop`
    becomes true, the answers end there.
    """
    import torch
    from transformers import StoppingCriteriaList

    assert generation.max_new_tokens != "auto", "the caller resolves it"
    tokenizer = family.processor.tokenizer
    batch = to_device(family.collate_prompts(prompts), model.device)
    sampling: dict[str, Any] = {"do_sample": generation.do_sample}
    if generation.do_sample:
        sampling |= {"temperature": generation.temperature, "min_p": generation.min_p}
    with torch.inference_mode():
        output = model.generate(
            **batch,
            max_new_tokens=generation.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=list(family.end_tokens),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_stopping(stop)] if stop else []),
            **sampling,
        )
    start = batch["input_ids"].shape[1]
    return [_until_end(row, family.end_tokens) for row in output[:, start:].tolist()]


def _stopping(stop: Callable[[], bool]) -> "Callable[..., torch.Tensor]":
    """A stopping criterion for all answers at once."""
    import torch

    def criterion(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.full((len(input_ids),), stop(), device=input_ids.device)

    return criterion


def _until_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


def _summed_loss(
    model: "PreTrainedModel", family: Family, rows: Sequence[Encoded]
) -> tuple[float, int]:
    """The summed negative log-likelihood of the answer tokens, and their number."""
    import torch
    from torch.nn.functional import cross_entropy

    batch = to_device(family.collate(rows), model.device)
    labels = batch.pop("labels")[:, 1:]  # (B, T-1)
    with torch.inference_mode():
        logits = model(**batch, use_cache=False).logits[:, :-1]  # (B, T-1, V)
        supervised = labels != IGNORED
        nll = cross_entropy(logits[supervised].float(), labels[supervised], reduction="sum")
    return float(nll), int(supervised.sum())
