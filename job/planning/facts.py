"""What a plan says, as values: the JSON form is these fields by these names.

Fields are only ever added. Sizes are bytes and times seconds; None is what could not be known.
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
    """Other than `rows` where sources are mixed by weights."""


@dataclass(frozen=True, kw_only=True)
class Data:
    sources: tuple[Source, ...]
    train_rows: int | None
    """An epoch's, of all sources."""
    held_out_rows: int | None
    exact: bool
    """Whether the rows are counted. They are estimated where some are held back by their content,
    and where a large list would have to be read through. What prep refuses, and what it removes as
    leaked, still counts as rows: it is seen in the sample alone, or not at all."""
    asked: int
    """Held-out rows that are judged at most."""
    sampled: int
    refused: int
    first_refusal: str | None
    too_long: int
    question: str | None
    """What rows ask that have no question of their own; None where nothing does."""
    images_a_row: float | None
    """In the sample, on average."""
    rows_without_image: int
    """Of the sample."""
    tokens_a_row: float | None
    longest_row: int | None
    tokens_an_epoch: int | None
    longest_answer: int | None
    """In tokens, of the sample."""
    max_new_tokens: int | None
    """The longest answer that is generated; of `auto` what it comes to with the sample."""
    answers_too_long: float
    """Share of the sample's answers that are longer, so that none like them can be right."""
    unknown: str | None
    """Why rows could not be counted or encoded."""
    missing: tuple[Problem, ...]
    """What is not there, or denied: a run would end for it with exit code 12."""
    warning: str | None
    """Why training will refuse the data, as far as the sample tells."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    rows_a_step: int
    """Of one process; several multiply it."""
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
    parameters: int
    trainable: int
    groups: tuple[Group, ...]
    served: str | None
    """What vLLM can serve of the adapter; None where the weights are trained themselves."""
    engine: str
    """Which one trains; with the reason where the plan is for one accelerator."""
    padded: bool
    """Whether batches are padded though `train.padding_free` is on, as the family needs it."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Peak memory of training on one accelerator."""

    accelerator: str
    title: str
    memory: int
    fits: bool
    tight: bool
    """Whether the estimate's uncertainty decides."""
    dtype: str
    parts: Mapping[str, int]
    total: int
    at_max_length: int
    """The same if every row of a batch were as long as `train.max_length` allows."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    batch_rows: int
    batch_tokens: int
    batch_patches: int
    basis: str
    """`sample`, or `max_length` where no row could be encoded."""
    uncertainty: float
    fits: tuple[Fit, ...]
    change: Mapping[str, Any] | None
    """Settings that would make the one named accelerator do; None where it does or none would."""
    change_total: int | None


@dataclass(frozen=True, kw_only=True)
class Disk:
    download: int
    """The checkpoint in the cache; 0 where it is on this machine."""
    prepared: int | None
    checkpoints: int
    """All that are kept at once at the output."""
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
class Duration:
    """Training alone: loading, evaluation and export come on top."""

    accelerator: str
    shortest: float
    longest: float
    cost_from: float | None
    cost_to: float | None
    sources: tuple[str, ...]
    beyond: bool
    """Whether passes of this job's size were not among those measured."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    name: str
    output: str
    settings: Mapping[str, Any]
    """Those that differ from their defaults, by dotted key."""
    data: Data
    steps: Steps
    model: Model
    memory: Memory | None
    memory_unknown: str | None
    disk: Disk
    pods: tuple[Pod, ...]
    time: Duration | None
    time_unknown: str | None
    stages: Mapping[str, str]
    stages_unknown: str | None

    def to_json(self) -> dict[str, Any]:
        return {"plan_version": VERSION, **asdict(self)}
