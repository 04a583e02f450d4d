"""Generates answers to held-out rows, greedy or sampled, and measures the loss."""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job import log
from job.evaluation.decoding import decode_greedily
from job.evaluation.prompts import Question
from job.families.base import IGNORED, Encoded, Family
from job.families.batches import to_device
from job.prep.rows import Row
from job.spec.types import GenerationSpec

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

READ_EVERY_ON_GPU = 8
"""Steps between two looks at the generated tokens, because each look waits for the GPU."""
# Settings of a model's generation_config.json that do not affect greedy answers of a given length.
_NOT_IN_GREEDY = frozenset((
    "do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens",
    "transformers_version", "_from_model_config",
))  # fmt: skip


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
    with log.progress(label, len(asked), unit="answers") as bar:
        tokens = generate_all(
            model, family, asked, generation, batch_size=batch_size, ended=bar.advance
        )
    nll, supervised = 0.0, 0
    for start in range(0, len(rows), batch_size):
        encoded = [family.encode(row) for row in rows[start : start + batch_size]]
        batch_nll, batch_supervised = _summed_loss(model, family, encoded)
        nll, supervised = nll + batch_nll, supervised + batch_supervised
    return GeneratedAnswers(
        texts=tuple(to_texts(family, tokens)),
        cut_short=tuple(len(row) == generation.max_new_tokens for row in tokens),
        loss=nll / supervised if supervised else math.nan,
        generated_tokens=sum(len(row) for row in tokens),
    )


def generate_all(
    model: "PreTrainedModel",
    family: Family,
    asked: Sequence[Question],
    generation: GenerationSpec,
    *,
    batch_size: int,
    ended: Callable[[int], object] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[list[int]]:
    """The tokens of the answers, without end token and padding; incomplete if `stop` becomes true.

    Generates `batch_size` answers at once, by the family's decoder if it has one and the answers
    are greedy. `ended` is called with the number of answers that were completed.
    """
    prompts = [
        family.encode_prompt(
            question.id,
            question.asked,
            question.images,
            enable_thinking=generation.enable_thinking,
        )
        for question in asked
    ]
    decoded = _decode(model, family, prompts, generation, batch_size, ended, stop)
    if decoded is not None:
        return decoded
    tokens: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        if stop is not None and stop():
            break
        batch = prompts[start : start + batch_size]
        tokens += generate(model, family, batch, generation, stop=stop)
        if ended is not None:
            ended(len(batch))
    return tokens


def _decode(
    model: "PreTrainedModel",
    family: Family,
    prompts: Sequence[Encoded],
    generation: GenerationSpec,
    batch_size: int,
    ended: Callable[[int], object] | None,
    stop: Callable[[], bool] | None,
) -> list[list[int]] | None:
    """The answers by the family's decoder; None if it cannot generate them."""
    assert generation.max_new_tokens != "auto", "the caller resolves it"
    if not prompts or not is_plain_greedy(model.generation_config, generation):
        return None
    read_every = 1 if model.device.type == "cpu" else READ_EVERY_ON_GPU
    longest = max(len(prompt.input_ids) for prompt in prompts)
    decoder = family.decoder(
        model,
        slots=min(batch_size, len(prompts)),
        capacity=longest + generation.max_new_tokens + read_every,
    )
    if decoder is None:
        return None
    return decode_greedily(
        decoder,
        prompts,
        max_new_tokens=generation.max_new_tokens,
        end_tokens=family.end_tokens,
        read_every=read_every,
        ended=ended,
        stop=stop,
    )


def is_plain_greedy(settings: "GenerationConfig", generation: GenerationSpec) -> bool:
    """Whether each token is the most likely one, by the model's `generation_config` and the spec.

    Any other setting of the model, such as a repetition penalty, changes the choice.
    """
    return not generation.do_sample and settings.to_diff_dict().keys() <= _NOT_IN_GREEDY


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
