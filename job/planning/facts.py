"""The contents of a plan. The field names are the keys of its JSON form.

Fields are only ever added. Sizes are in bytes, times in seconds; None means unknown.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from job.errors import Problem

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of training rows."""

    uri: str
    rows: int | None
    rows_an_epoch: int | None
    """Differs from `rows` if sources are mixed by weights."""


@dataclass(frozen=True, kw_only=True)
class Data:
    sources: tuple[Source, ...]
    train_rows: int | None
    """Per epoch, of all sources."""
    held_out_rows: int | None
    validation_rows: int | None
    """None, too, without a validation split."""
    exact: bool
    """Whether the rows are counted. They are estimated if held-out rows are chosen by content of
    more rows than a plan reads, or if a large list would have to be read in full. Unless
    `as_prepared`, rows that prep rejects, or removes as leaked, are included: only the sample shows
    them, if anything does."""
    as_prepared: bool
    """Whether all rows were read and split, so that the counts are those of a run."""
    asked: int
    """The maximum number of held-out rows to evaluate."""
    sampled: int
    refused: int
    first_refusal: str | None
    too_long: int
    question: str | None
    """The question for rows without one; None without data.instruction."""
    images_a_row: float | None
    """The sample's mean."""
    rows_without_image: int
    """In the sample."""
    tokens_a_row: float | None
    longest_row: int | None
    tokens_an_epoch: int | None
    longest_answer: int | None
    """In tokens, in the sample."""
    max_new_tokens: int | None
    """The longest answer that is generated; `auto` as the sample resolves it."""
    answers_too_long: float
    """Share of the sample's labels that are longer, so that no generated answer can match them."""
    unknown: str | None
    """Why rows could not be counted or encoded."""
    missing: tuple[Problem, ...]
    """Missing or inaccessible data: a run would exit with 12."""
    warning: str | None
    """Why training will refuse the data, judging by the sample."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    rows_a_step: int
    """Per process."""
    processes: int
    """That train together; 1 if the user named none."""
    total: int | None
    an_epoch: int | None
    epochs: float | None


@dataclass(frozen=True, kw_only=True)
class Group:
    name: str
    tensors: int
    trainable: int
    patterns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Model:
    family: str
    uri: str
    adapter: str | None
    """The adapter that training continues from."""
    parameters: int
    trainable: int
    groups: tuple[Group, ...]
    served: str | None
    """How vLLM can serve the adapter; None for a full fine-tune."""
    engine: str
    """The training engine, with the reason if the plan is for one accelerator."""
    padded: str | None
    """Why batches are padded despite `train.padding_free`; None if they are not."""
    compiled: str
    """Whether blocks are compiled, and why; if so by `auto`, there has to be a compiler."""


@dataclass(frozen=True, kw_only=True)
class DeviceFit:
    """Peak memory of training on one accelerator."""

    accelerator: str
    title: str
    memory: int
    fits: bool
    tight: bool
    """Whether the verdict is within the estimate's uncertainty."""
    dtype: str
    parts: Mapping[str, int]
    total: int
    processes: int | None
    """Those that the user names, or else the fewest with which sharded weights fit, or the most
    that were tried; None if they are not sharded."""
    loading: int
    """Before the peak: what a process holds while it loads its shards of the weights, or, if they
    are random, all of them; 0 if they are not sharded."""
    at_max_length: int
    """The total if every row of the batch were as long as `train.max_length` allows."""
    pass_rows: int
    """Rows of a pass, as training is expected to choose them for this accelerator."""
    passes: int
    """Passes of a step, in each process."""
    gradient_checkpointing: bool
    pass_tokens: int
    """Of the heaviest pass."""


@dataclass(frozen=True, kw_only=True)
class MemoryFit:
    """Peak memory of training with the heaviest pass, on each accelerator."""

    batch_rows: int
    """With `batch_tokens` and `batch_patches`: the heaviest pass, on the accelerator whose passes
    have the most rows."""
    batch_tokens: int
    batch_patches: int
    basis: str
    """`sample`, or `max_length` if no row could be encoded."""
    uncertainty: float
    fits: tuple[DeviceFit, ...]
    change: Mapping[str, Any] | None
    """Settings with which training fits the largest accelerator; None if it fits, or none help."""
    change_total: int | None


@dataclass(frozen=True, kw_only=True)
class Disk:
    download: int
    """The model's checkpoint; 0 if it is on this machine."""
    prepared: int | None
    checkpoints: int
    """All that the output keeps at one time."""
    adapter: int
    merged: int


@dataclass(frozen=True, kw_only=True)
class Pod:
    name: str
    memory: int
    shared_memory: int
    scratch: int
    cache: int


@dataclass(frozen=True, kw_only=True)
class TrainingTime:
    """The time of training only, without loading, evaluation and export; of the train stage if
    whole jobs were measured (`job_time`)."""

    accelerator: str
    shortest: float
    longest: float
    cost_from: float | None
    cost_to: float | None
    sources: tuple[str, ...]
    beyond: bool
    """Whether micro-batches of this size were never measured."""


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """The time of a stage, or of all."""

    stage: str
    """`start` before the first stage, `finish` after the export, `total` for all."""
    shortest: float
    """With answers as long as the sample's."""
    longest: float
    """If no generated answer ends before `max_new_tokens`."""
    error: float
    """The relative error of both."""
    cost_from: float | None
    cost_to: float | None


@dataclass(frozen=True, kw_only=True)
class JobTime:
    """The time of the stages that will run, without downloads and uploads."""

    accelerator: str
    stages: tuple[StageTime, ...]
    total: StageTime
    sources: tuple[str, ...]
    """The files under benchmarks/results/ with the measured jobs."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation during training."""

    rows: int
    """At most, each time."""
    times: int | None
    metric: str
    answers: bool
    """Whether answers are generated too, whose time is not estimated."""
    share: float | None
    """The time to measure the loss as a fraction of the training time."""
    seconds: tuple[float, float] | None
    """The time to measure the loss once, from shortest to longest."""


@dataclass(frozen=True, kw_only=True)
class AnswersFit:
    """Peak memory of a training pass of reinforcement on a device."""

    accelerator: str
    total: int
    memory: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Reinforcement:
    """The reinforce stage."""

    steps: int
    rows_a_step: int
    answers_a_step: int
    answers: int
    """To generate, over all steps."""
    tokens: int | None
    """Prompts and answers that are generated, at most; None if the rows' lengths are unknown."""
    cache_bytes: int | None
    """Keys and values of the answers that are generated at once, at most."""
    logits_bytes: int
    """Logits of the answers of a pass in fp32 with their gradient, at most."""
    copied_bytes: int
    """The copies of the adapter that the divergence (`beta`) needs; 0 without."""
    fits: tuple[AnswersFit, ...]
    """With answers as long as they may be, on each device; none if the family cannot tell."""
    shortest: float | None
    """Seconds, with answers as long as the sample's; None if no similar job was measured."""
    longest: float | None
    """If no answer ends before `max_completion_length`."""
    generating: float | None
    """The share of generation in `longest`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    name: str
    output: str
    settings: Mapping[str, Any]
    """Those that differ from their defaults, by dotted key."""
    data: Data
    steps: Steps
    model: Model
    memory: MemoryFit | None
    memory_unknown: str | None
    disk: Disk
    pods: tuple[Pod, ...]
    time: TrainingTime | None
    time_unknown: str | None
    job_time: JobTime | None
    """None if no similar job was measured; `time` may still be known."""
    work: Mapping[str, Any] | None
    """The quantities that the time of stages depends on, see `job.planning.stage_work.Work`."""
    validation: Validation | None
    """None without validation."""
    reinforcement: Reinforcement | None
    """None without the stage."""
    stages: Mapping[str, str]
    stages_unknown: str | None

    def to_json(self) -> dict[str, Any]:
        return {"plan_version": VERSION, **asdict(self)}
