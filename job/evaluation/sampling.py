"""Sampled answers: several to each prompt, with the token that ends each, for reinforcement.

By the family's decoder if it has one, else by Transformers. Random numbers come from torch's
global generator, so equal states give equal answers on a CPU.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from job import log
from job.engines.device import release_memory
from job.engines.free_memory import is_out_of_memory
from job.evaluation.decoding import READ_EVERY_ON_GPU, decode_prompts
from job.evaluation.generate import in_batches, stopping
from job.evaluation.rows_at_once import MOST_ON_CPU
from job.families.base import Family
from job.families.batches import to_device
from job.families.encoded import Encoded

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel

ROWS_ON_GPU = 128
"""Answers at once: a constant, because sampled answers depend on it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int
    temperature: float
    top_p: float


@dataclass(kw_only=True)
class AtOnce:
    """How many answers are generated at once: fewer for good once they have not fitted."""

    rows: int

    @classmethod
    def on(cls, device: "torch.device") -> "AtOnce":
        return cls(rows=MOST_ON_CPU if device.type == "cpu" else ROWS_ON_GPU)


def sample_answers(
    model: "PreTrainedModel | PeftModel",
    family: Family,
    prompts: Sequence[Encoded],
    sampling: Sampling,
    *,
    at_once: AtOnce | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[list[int]]:
    """An answer to each prompt: its tokens, and the end token unless it was cut short.

    A prompt that is listed several times is answered as often. The model has to be in evaluation
    mode. The checkpoint's own settings of generation, such as a penalty, do not apply. If `stop`
    becomes true, the answers end there, and may be empty. If `at_once` do not fit into the memory,
    it is lowered. Raises an error of the device if one alone does not fit.
    """
    never = never_sampled(family, model.get_output_embeddings().weight.shape[0])
    at_once = at_once or AtOnce.on(model.device)
    while True:
        rows = min(at_once.rows, len(prompts))
        try:
            if family.has_decoder(model):
                return _decode(model, family, prompts, sampling, never, rows, stop)
            return _generate(model, family, prompts, sampling, never, rows, stop)
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
        # Not in the handler: its traceback would keep the attempt's tensors.
        at_once.rows = rows // 2
        release_memory()
        log.info("fewer answers are generated at once to fit", rows=at_once.rows)


def never_sampled(family: Family, vocabulary: int) -> list[int]:
    """The control tokens that do not end an answer: without its image, a placeholder for one has no
    meaning, and no model could be run on it."""
    tokenizer = family.processor.tokenizer
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    control |= {*tokenizer.all_special_ids}
    control |= {token for token in range(vocabulary) if family.is_image_token(token)}
    return sorted(token for token in control - {*family.end_tokens} if token < vocabulary)


def draw(logits: "torch.Tensor", sampling: Sampling, never: "torch.Tensor") -> "torch.Tensor":
    """A token (B,) for each row of logits (B, V), none of `never` (N,)."""
    import torch

    allowed = logits.float().index_fill(1, never, -torch.inf)
    probabilities = torch.softmax(allowed / sampling.temperature, dim=-1)  # (B, V)
    if sampling.top_p < 1:
        likely, order = probabilities.sort(dim=-1, descending=True)
        # Of the tokens before which less than top_p has been counted, the first always is one.
        dropped = likely.cumsum(-1) - likely >= sampling.top_p
        probabilities = probabilities.scatter(1, order, likely.masked_fill(dropped, 0))
    return torch.multinomial(probabilities, 1)[:, 0]


# --- by the family's decoder -----------------------------------------------------------------


def _decode(
    model: "PreTrainedModel | PeftModel",
    family: Family,
    prompts: Sequence[Encoded],
    sampling: Sampling,
    never: Sequence[int],
    slots: int,
    stop: Callable[[], bool] | None,
) -> list[list[int]]:
    import torch

    read_every = 1 if model.device.type == "cpu" else READ_EVERY_ON_GPU
    longest = max(len(prompt.input_ids) for prompt in prompts)
    decoder = family.decoder(
        model, slots=slots, capacity=longest + sampling.max_new_tokens + read_every
    )
    excluded = torch.tensor(never, dtype=torch.long, device=model.device)
    return decode_prompts(
        decoder,
        prompts,
        max_new_tokens=sampling.max_new_tokens,
        end_tokens=family.end_tokens,
        read_every=read_every,
        stop=stop,
        draw=lambda logits: draw(logits, sampling, excluded),
        keep_end=True,
    )


# --- by Transformers -------------------------------------------------------------------------


def _generate(
    model: "PreTrainedModel | PeftModel",
    family: Family,
    prompts: Sequence[Encoded],
    sampling: Sampling,
    never: Sequence[int],
    rows: int,
    stop: Callable[[], bool] | None,
) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        suppress_tokens=list(never) or None,
        pad_token_id=family.processor.tokenizer.pad_token_id,
        eos_token_id=list(family.end_tokens),
    )
    criteria = StoppingCriteriaList([stopping(stop)] if stop else [])

    def answer(prompts: Sequence[Encoded]) -> list[list[int]]:
        batch = to_device(family.collate_prompts(prompts), model.device)
        with torch.inference_mode(), _generating_by(model, settings):
            output = model.generate(**batch, generation_config=settings, stopping_criteria=criteria)
        begin = batch["input_ids"].shape[1]
        return [_up_to_end(row, family.end_tokens) for row in output[:, begin:].tolist()]

    return in_batches(prompts, answer, rows=rows, stop=stop)


@contextmanager
def _generating_by(
    model: "PreTrainedModel | PeftModel", settings: "GenerationConfig"
) -> Iterator[None]:
    """A context in which the model has no other settings of generation.

    Transformers fills what `settings` leave open from those of the model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = base.generation_config
    base.generation_config = settings
    try:
        yield
    finally:
        base.generation_config = own


def _up_to_end(tokens: Sequence[int], end_tokens: Collection[int]) -> list[int]:
    for count, token in enumerate(tokens, start=1):
        if token in end_tokens:
            return list(tokens[:count])
    return list(tokens)
