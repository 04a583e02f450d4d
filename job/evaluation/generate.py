"""Generates answers to held-out rows, greedy or sampled, and measures the loss."""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job import log
from job.evaluation.prompts import Question
from job.families.base import IGNORED, Encoded, Family
from job.families.batches import to_device
from job.prep.rows import Row
from job.spec.types import GenerationSpec

if TYPE_CHECKING:
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
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            prompts = [
                family.encode_prompt(
                    question.id,
                    question.asked,
                    question.images,
                    enable_thinking=generation.enable_thinking,
                )
                for question in batch
            ]
            tokens = generate(model, family, prompts, generation)
            generated += sum(len(row) for row in tokens)
            cut += [len(row) == generation.max_new_tokens for row in tokens]
            texts += [
                family.processor.tokenizer.decode(row, skip_special_tokens=True).strip()
                for row in tokens
            ]
            bar.advance(len(batch))
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


def generate(
    model: "PreTrainedModel",
    family: Family,
    prompts: Sequence[Encoded],
    generation: GenerationSpec,
    streamer: "BaseStreamer | None" = None,
) -> list[list[int]]:
    """The tokens generated after each prompt, without end token and padding.

    `generation.max_new_tokens` must be a number. A `streamer` works with one prompt only.
    """
    import torch

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
            **sampling,
        )
    start = batch["input_ids"].shape[1]
    return [_until_end(row, family.end_tokens) for row in output[:, start:].tolist()]


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
