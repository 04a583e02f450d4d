"""What the reinforce stage has to do, the memory it adds to a training's, and how long it takes.

Its time is that of generating the answers and of training on them, each by the rates of measured
jobs; generation in such a job is greedy, so sampling is not in it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from job.engines.device import Accelerator
from job.engines.memory import estimate, longest
from job.evaluation.rows_at_once import MOST_ON_CPU, cache_bytes
from job.evaluation.sampling import ROWS_ON_GPU
from job.families.base import Family
from job.families.encoded import RowSize
from job.planning import facts
from job.planning.cost_model import CostModel, measured_jobs
from job.planning.devices import THIS_MACHINE
from job.planning.sample import worst_batch
from job.planning.stage_work import Work
from job.reinforce.settings import as_training
from job.spec.types import JobSpec, ReinforceSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_COPIES = 3
"""Logits, log-probabilities and their gradient, in fp32."""


def reinforcement(
    family: type[Family],
    spec: JobSpec,
    model: "PreTrainedModel",
    data: facts.Data,
    sampled: Sequence[RowSize],
    work: Work | None,
    devices: Mapping[str, Accelerator],
    *,
    answer_tokens: float | None,
    trainable: int,
) -> facts.Reinforcement | None:
    """The stage on the devices.

    Its time is that on this machine, or on the only device; None if no similar job was measured.

    `sampled` are sizes of training rows; if there are none, rows are taken to be as long as
    allowed. `work` has the quantities of the whole job, None if the rows are unknown.
    """
    own = spec.reinforce
    if own is None:
        return None
    alone = next(iter(devices.values())) if len(devices) == 1 else None
    device = devices.get(THIS_MACHINE, alone)
    answers = own.rollouts * own.answers_a_step
    on_cpu = device is not None and device.kind == "cpu"
    at_once = min(own.answers_a_step, MOST_ON_CPU if on_cpu else ROWS_ON_GPU)
    row = None if data.tokens_a_row is None else data.tokens_a_row + own.max_completion_length
    vocabulary = model.config.get_text_config().vocab_size
    seconds = _seconds(own, answers, row, work, device, answer_tokens)
    logits = (
        LOGITS_COPIES * 4 * own.per_device_train_batch_size * own.max_completion_length * vocabulary
    )
    copied = 2 * 4 * trainable if own.beta else 0
    return facts.Reinforcement(
        steps=own.max_steps,
        rows_a_step=own.rows_a_step,
        answers_a_step=own.answers_a_step,
        answers=answers,
        tokens=None if row is None else int(answers * row),
        cache_bytes=None if row is None else int(at_once * row * cache_bytes(model)),
        logits_bytes=logits,
        copied_bytes=copied,
        fits=tuple(_fits(family, spec, model, sampled, devices, logits + copied)),
        shortest=None if seconds is None else round(seconds[0], 1),
        longest=None if seconds is None else round(seconds[1], 1),
        generating=None if seconds is None else round(seconds[2], 2),
    )


def _fits(
    family: type[Family],
    spec: JobSpec,
    model: "PreTrainedModel",
    sampled: Sequence[RowSize],
    devices: Mapping[str, Accelerator],
    of_answers: int,
) -> Iterator[facts.AnswersFit]:
    """Whether a pass fits; `of_answers` are the bytes of their logits and of copied weights."""
    own = spec.reinforce
    assert own is not None
    length = own.max_completion_length
    answered = [
        replace(row, tokens=row.tokens - row.supervised_tokens + length, supervised_tokens=length)
        for row in sampled or (longest(model, spec),)
    ]
    batch = worst_batch(answered, own.per_device_train_batch_size)
    for name, device in devices.items():
        training = as_training(spec, on_gpu=device.kind != "cpu")
        memory = estimate(family, model, training, batch, device)
        if memory is None:
            return
        memory = replace(memory, logits=of_answers)
        yield facts.AnswersFit(
            accelerator=name,
            total=memory.total,
            memory=device.memory_bytes,
            fits=memory.fits(device.memory_bytes),
        )


def _seconds(
    own: ReinforceSpec,
    answers: int,
    row: float | None,
    work: Work | None,
    device: Accelerator | None,
    answer_tokens: float | None,
) -> tuple[float, float, float] | None:
    """Shortest and longest, and the share of generation in the latter."""
    if work is None or device is None or row is None:
        return None
    model = CostModel.of(measured_jobs(), device.name, device.cores, work)
    if model is None:
        return None
    slots = min(own.answers_a_step, MOST_ON_CPU if device.kind == "cpu" else ROWS_ON_GPU)
    passes = own.max_steps * own.gradient_accumulation_steps
    found = []
    for length in (
        min(answer_tokens or own.max_completion_length, own.max_completion_length),
        own.max_completion_length,
    ):
        tokens = own.max_steps * own.answers_a_step * (row - own.max_completion_length + length)
        whole = replace(
            work,
            answers=answers,
            new_tokens=length,
            slots=slots,
            steps=own.max_steps,
            passes=passes,
            tokens=tokens,
            compiled=False,
            validated_tokens=0.0,
        )
        stages = model.estimate(whole, ["train", "eval"])
        found.append((stages["eval"].seconds, stages["train"].seconds))
    (first_generation, first_training), (generation, training) = found
    return (
        first_generation + first_training,
        generation + training,
        (generation / max(generation + training, 1e-9)),
    )
