"""The time and cost of every stage of a job, and of the whole, for a plan."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from job.engines.device import Accelerator
from job.planning import facts
from job.planning.cost_model import ERROR_BEYOND, CostModel, MeasuredJob, StageEstimate
from job.planning.data import DataSurvey
from job.planning.scaling import Scaling
from job.planning.sizes import BYTES, Sizes
from job.planning.stage_work import MAX_SLOTS, STAGES, Work
from job.spec.types import JobSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def work_of(
    spec: JobSpec,
    config: "PretrainedConfig",
    sizes: Sizes,
    data: facts.Data,
    steps: facts.Steps,
    *,
    passes_a_step: int,
    compiled: bool,
    validated_rows: int,
) -> Work | None:
    """The quantities of the job, with answers as long as they may be; None if rows are unknown."""
    if data.train_rows is None or data.tokens_a_row is None or steps.total is None:
        return None
    held_out, validation = data.held_out_rows or 0, data.validation_rows or 0
    answers = min(held_out, spec.eval.max_samples)
    bound = spec.train.per_device_eval_batch_size
    return Work(
        parameters=sizes.parameters,
        layers=int(config.get_text_config().num_hidden_layers),
        base_bytes=sizes.parameters * BYTES["bfloat16"],
        merged_bytes=sizes.merged,
        trainable=sizes.trainable,
        prep_rows=data.train_rows + held_out + validation,
        train_rows=data.train_rows,
        validated_tokens=validated_rows * data.tokens_a_row,
        steps=steps.total,
        passes=steps.total * passes_a_step,
        tokens=steps.total * steps.rows_a_step * data.tokens_a_row,
        compiled=compiled,
        four_bit=spec.model.load_in_4bit,
        answers=answers,
        new_tokens=data.max_new_tokens or 0,
        slots=max(1, min(answers, bound if isinstance(bound, int) else MAX_SLOTS)),
    )


def answer_tokens(survey: DataSurvey) -> float | None:
    """The mean length of the sampled rows' answers; None without a sample."""
    lengths = [length for sample in survey.samples or () for length in sample.answers]
    return fmean(lengths) if lengths else None


def job_time(
    known: Iterable[MeasuredJob],
    device: Accelerator,
    name: str,
    work: Work,
    *,
    answer_tokens: float | None,
    skipped: Collection[str],
    price_per_hour: float | None,
    processes: int = 1,
    scaling: Scaling | None = None,
) -> facts.JobTime | None:
    """The time of the stages that will run; None if no similar job was measured.

    At the shortest, answers are as long as the sample's (`answer_tokens`); at the longest, none
    ends before `max_new_tokens`. `work` is that of each of the processes, whose devices cost
    `price_per_hour` each; `scaling` is what was measured of several.
    """
    model = CostModel.of(known, device.name, device.cores, work)
    if model is None:
        return None
    ran = [stage for stage in STAGES if stage not in skipped]
    brief = min(work.new_tokens, answer_tokens or work.new_tokens)
    longest = model.estimate(work, ran)
    shortest = model.estimate(_with_answers(work, brief), ran)
    sources = model.sources
    if scaling is not None:
        sources += (scaling.source,)
        for estimates in (longest, shortest):
            if "train" in estimates:
                estimates["train"] = _together(estimates["train"], scaling, processes)
    price = None if price_per_hour is None else processes * price_per_hour
    stages = tuple(_stage_time(stage, shortest[stage], longest[stage], price) for stage in longest)
    whole = sum(stage.longest for stage in stages)
    error = sum(stage.longest * stage.error for stage in stages) / max(whole, 1e-9)
    total = _stage_time(
        "total",
        StageEstimate(seconds=sum(stage.shortest for stage in stages), error=error),
        StageEstimate(seconds=whole, error=error),
        price,
    )
    return facts.JobTime(accelerator=name, stages=stages, total=total, sources=sources)


def _together(alone: StageEstimate, scaling: Scaling, processes: int) -> StageEstimate:
    """The time of a training by several processes, each of which would take `alone`."""
    measured = scaling.processes == processes
    return StageEstimate(
        seconds=alone.seconds / scaling.efficiency,
        error=alone.error if measured else max(alone.error, ERROR_BEYOND),
    )


def _with_answers(work: Work, new_tokens: float) -> Work:
    return replace(work, new_tokens=new_tokens)


def _stage_time(
    stage: str, shortest: StageEstimate, longest: StageEstimate, price: float | None
) -> facts.StageTime:
    low, high = sorted((shortest.seconds, longest.seconds))
    return facts.StageTime(
        stage=stage,
        shortest=round(low, 1),
        longest=round(high, 1),
        error=round(max(shortest.error, longest.error), 2),
        cost_from=None if price is None else round(low / 3600 * price, 4),
        cost_to=None if price is None else round(high / 3600 * price, 4),
    )


def training_of(whole: facts.JobTime) -> facts.TrainingTime | None:
    """The time of the train stage; None if it will not run."""
    found = next((stage for stage in whole.stages if stage.stage == "train"), None)
    if found is None:
        return None
    low, high = 1 - found.error, 1 + found.error
    return facts.TrainingTime(
        accelerator=whole.accelerator,
        shortest=round(found.shortest * low, 1),
        longest=round(found.longest * high, 1),
        cost_from=None if found.cost_from is None else round(found.cost_from * low, 2),
        cost_to=None if found.cost_to is None else round(found.cost_to * high, 2),
        sources=whole.sources,
        beyond=found.error >= ERROR_BEYOND,
    )
