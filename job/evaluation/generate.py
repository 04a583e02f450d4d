"""Predictions of a model on held-out rows: greedy or sampled answers, and the loss."""

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from job import log
from job.evaluation.prompts import Question
from job.families.base import IGNORED, Encoded, Family
from job.families.batches import to_device
from job.prep.rows import Row
from job.spec.types import GenerationSpec


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the model answered, in the questions' order, and how it did on the true answers."""

    texts: tuple[str, ...]
    cut_short: tuple[bool, ...]
    """Whether an answer is as long as any may be, without having ended."""
    loss: float
    """Mean cross-entropy of an answer's token, over all tokens of all answers of the rows."""
    generated_tokens: int


def answer_rows(
    model: Any,
    family: Family,
    asked: Sequence[Question],
    rows: Sequence[Row],
    generation: GenerationSpec,
    *,
    batch_size: int,
    label: str,
) -> Answers:
    """Answers every question, and measures the loss of the rows' true answers."""
    model.eval()
    texts: list[str] = []
    cut: list[bool] = []
    generated = 0
    with log.progress(label, len(asked), unit="answers") as bar:
        for start in range(0, len(asked), batch_size):
            part = asked[start : start + batch_size]
            prompts = [
                family.encode_prompt(
                    question.id,
                    question.asked,
                    question.images,
                    enable_thinking=generation.enable_thinking,
                )
                for question in part
            ]
            tokens = generate(model, family, prompts, generation)
            generated += sum(len(row) for row in tokens)
            cut += [len(row) == generation.max_new_tokens for row in tokens]
            texts += [
                family.processor.tokenizer.decode(row, skip_special_tokens=True).strip()
                for row in tokens
            ]
            bar.advance(len(part))
    nll, supervised = 0.0, 0
    for start in range(0, len(rows), batch_size):
        encoded = [family.encode(row) for row in rows[start : start + batch_size]]
        part_nll, part_supervised = _loss(model, family, encoded)
        nll, supervised = nll + part_nll, supervised + part_supervised
    return Answers(
        texts=tuple(texts),
        cut_short=tuple(cut),
        loss=nll / supervised if supervised else math.nan,
        generated_tokens=generated,
    )


def generate(
    model: Any,
    family: Family,
    prompts: Sequence[Encoded],
    generation: GenerationSpec,
    streamer: Any = None,
) -> list[list[int]]:
    """The tokens that the model writes after each prompt, without the end token and padding.

    At most `generation.max_new_tokens`, a number by now; as many only where no end was reached.
    A `streamer`, which Transformers calls with each token, takes one prompt only.
    """
    import torch

    assert generation.max_new_tokens != "auto", "the length is known before answers are made"
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


def _loss(model: Any, family: Family, rows: Sequence[Encoded]) -> tuple[float, int]:
    """The summed negative log-likelihood of the answers' tokens, and how many there are."""
    import torch
    from torch.nn.functional import cross_entropy

    batch = to_device(family.collate(rows), model.device)
    labels = batch.pop("labels")[:, 1:]  # (B, T-1)
    with torch.inference_mode():
        logits = model(**batch, use_cache=False).logits[:, :-1]  # (B, T-1, V)
        chosen = labels != IGNORED
        nll = cross_entropy(logits[chosen].float(), labels[chosen], reduction="sum")
    return float(nll), int(chosen.sum())
