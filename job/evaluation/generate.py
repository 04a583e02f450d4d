"""Generates answers to held-out rows, greedy or sampled, and measures the loss."""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from job import log
from job.engines.device import release_memory
from job.engines.free_memory import is_out_of_memory
from job.evaluation.decoding import READ_EVERY_ON_GPU, decode_prompts
from job.evaluation.prompts import Question
from job.evaluation.rows_at_once import rows_at_once
from job.families.base import Family
from job.families.batches import to_device
from job.families.encoded import Encoded
from job.prep.rows import Row
from job.spec.types import GenerationSpec

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

    from job.families.base import Decoder

T = TypeVar("T")
BatchSize = int | Literal["auto"]
Answers = list[list[int]]

THOUGHTS_END = "</think>"
"""What ends the thoughts before an answer."""
SAMPLED_ROWS = 32
"""Sampled answers depend on the rows of a batch, so these must not depend on free memory."""
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
    batch_size: BatchSize,
    label: str,
) -> GeneratedAnswers:
    """Generates an answer to every question, and measures the loss on the rows' answers."""
    model.eval()
    encoded = [family.encode(row) for row in rows]  # first: a row may be refused
    with log.progress(label, len(asked), unit="answers") as bar:
        tokens = generate_all(
            model, family, asked, generation, batch_size=batch_size, ended=bar.advance
        )
    nll, supervised = _loss(model, family, encoded, batch_size)
    return GeneratedAnswers(
        texts=tuple(to_texts(family, tokens, thinks=generation.enable_thinking)),
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
    batch_size: BatchSize,
    ended: Callable[[int], object] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Answers:
    """The tokens of the answers, without end token and padding; incomplete if `stop` becomes true.

    Generates at most `batch_size` answers at once, by the family's decoder if it has one and the
    answers are greedy; fewer if they do not fit into the memory. `ended` is called with the number
    of answers that were completed.
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
    assert generation.max_new_tokens != "auto", "the caller resolves it"
    if not prompts:
        return []
    by_decoder = _decodes(model, family, generation)
    if generation.do_sample:
        rows = SAMPLED_ROWS if batch_size == "auto" else batch_size
    else:
        rows = rows_at_once(
            model,
            prompts,
            batch_size,
            new_tokens=generation.max_new_tokens,
            by_decoder=by_decoder,
        )
    reported = 0

    def answer(rows: int) -> Answers:
        completed = 0

        def more(count: int) -> None:
            nonlocal completed, reported
            completed += count
            if ended is not None and completed > reported:
                ended(completed - reported)
            reported = max(reported, completed)

        if by_decoder:
            return _decode(model, family, prompts, generation, slots=rows, ended=more, stop=stop)

        def batch(prompts: Sequence[Encoded]) -> Answers:
            return generate(model, family, prompts, generation, stop=stop)

        return in_batches(prompts, batch, rows=rows, ended=more, stop=stop)

    return _halved_until_it_fits(answer, rows, "generation batches")


def stream_answer(
    model: "PreTrainedModel",
    family: Family,
    prompt: Encoded,
    generation: GenerationSpec,
    streamer: "BaseStreamer",
) -> list[int]:
    """Generates one answer, and passes each token to the streamer as soon as it is chosen."""
    import torch

    model.eval()
    if not _decodes(model, family, generation):
        return generate(model, family, [prompt], generation, streamer)[0]
    streamer.put(torch.tensor([prompt.input_ids]))

    def put(_: int, tokens: Sequence[int]) -> None:
        for token in tokens:
            streamer.put(torch.tensor([token]))

    [answer] = _decode(model, family, [prompt], generation, slots=1, read_every=1, streamed=put)
    streamer.end()
    return answer


def _halved_until_it_fits(attempt: Callable[[int], T], rows: int, what: str) -> T:
    """The result of `attempt` with `rows` rows at once, or half as many until they fit into memory.

    Raises the error of a single row that does not fit.
    """
    while True:
        try:
            return attempt(rows)
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
        # Not in the handler: its traceback would keep the attempt's tensors.
        rows //= 2
        release_memory()
        log.info(f"{what} are made smaller to fit", rows=rows)


def _loss(
    model: "PreTrainedModel", family: Family, encoded: Sequence[Encoded], batch_size: BatchSize
) -> tuple[float, int]:
    """The summed loss of the answers' tokens, and their number."""
    from job.families.held_out_loss import LOSS_TOKENS, held_out_loss, rows_of_a_batch

    most = rows_of_a_batch(batch_size)
    tokens = 0 if model.device.type == "cpu" else LOSS_TOKENS

    def measure(rows: int) -> tuple[float, int]:
        return held_out_loss(model, family, encoded, rows=rows, tokens=tokens * rows // most)

    return _halved_until_it_fits(measure, most, "evaluation batches")


# --- by the family's decoder -----------------------------------------------------------------


def _decodes(model: "PreTrainedModel", family: Family, generation: GenerationSpec) -> bool:
    """Whether the family's decoder generates the answers."""
    return is_plain_greedy(model.generation_config, generation) and family.has_decoder(model)


def _decode(
    model: "PreTrainedModel",
    family: Family,
    prompts: Sequence[Encoded],
    generation: GenerationSpec,
    *,
    slots: int,
    read_every: int | None = None,
    ended: Callable[[int], object] | None = None,
    streamed: Callable[[int, Sequence[int]], object] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Answers:
    assert generation.max_new_tokens != "auto", "the caller resolves it"
    if read_every is None:
        read_every = 1 if model.device.type == "cpu" else READ_EVERY_ON_GPU
    longest = max(len(prompt.input_ids) for prompt in prompts)
    decoder: Decoder = family.decoder(
        model,
        slots=min(slots, len(prompts)),
        capacity=longest + generation.max_new_tokens + read_every,
    )
    return decode_prompts(
        decoder,
        prompts,
        max_new_tokens=generation.max_new_tokens,
        end_tokens=family.end_tokens,
        read_every=read_every,
        ended=ended,
        streamed=streamed,
        stop=stop,
    )


def is_plain_greedy(settings: "GenerationConfig", generation: GenerationSpec) -> bool:
    """Whether each token is the most likely one, by the model's `generation_config` and the spec.

    Any other setting of the model, such as a repetition penalty, changes the choice.
    """
    return not generation.do_sample and settings.to_diff_dict().keys() <= _NOT_IN_GREEDY


def to_texts(family: Family, answers: Sequence[Sequence[int]], *, thinks: bool) -> list[str]:
    """The answers as text, without the thoughts before them if the model `thinks`.

    If the thoughts do not end, they are the answer.
    """
    tokenizer = family.processor.tokenizer
    end = tokenizer.convert_tokens_to_ids(THOUGHTS_END)
    texts = []
    for row in answers:
        answer = list(row)
        if thinks and end != tokenizer.unk_token_id and end in answer:
            # By its token: as a control token it is not in the text.
            answer = answer[len(answer) - answer[::-1].index(int(end)) :]
        text = str(tokenizer.decode(answer, skip_special_tokens=True))
        texts.append((text.rpartition(THOUGHTS_END)[2] if thinks else text).strip())
    return texts


# --- by Transformers -------------------------------------------------------------------------


def in_batches(
    prompts: Sequence[Encoded],
    answer: Callable[[Sequence[Encoded]], Answers],
    *,
    rows: int,
    ended: Callable[[int], object] | None = None,
    stop: Callable[[], bool] | None,
) -> Answers:
    """By batches of prompts of similar length, longest first, so that little is padding."""
    answers: Answers = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].input_ids))
    for start in range(0, len(order), rows):
        if stop is not None and stop():
            break
        numbers = order[start : start + rows]
        batch = answer([prompts[number] for number in numbers])
        for number, tokens in zip(numbers, batch, strict=True):
            answers[number] = tokens
        if ended is not None:
            ended(len(numbers))
    return answers


def generate(
    model: "PreTrainedModel",
    family: Family,
    prompts: Sequence[Encoded],
    generation: GenerationSpec,
    streamer: "BaseStreamer | None" = None,
    stop: Callable[[], bool] | None = None,
) -> Answers:
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
            stopping_criteria=StoppingCriteriaList([stopping(stop)] if stop else []),
            **sampling,
        )
    start = batch["input_ids"].shape[1]
    return [_until_end(row, family.end_tokens) for row in output[:, start:].tolist()]


def stopping(stop: Callable[[], bool]) -> "Callable[..., torch.Tensor]":
    """A stopping criterion for all answers at once."""
    import torch

    def criterion(input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.full((len(input_ids),), stop(), device=input_ids.device)

    return criterion


def _until_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in ends, tokens))
