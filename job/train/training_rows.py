"""Selects the rows to train on, and publishes the label proof and length statistics."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from job.distributed import process_group
from job.families.base import Family
from job.families.encoded import Encoded
from job.prep.rows import Row
from job.redaction import as_json
from job.spec.types import JobSpec
from job.train.dataset import EncodedDataset
from job.train.label_proof import LABEL_PROOF, write_label_proof
from job.train.length_filter import FilteredRows, filter_by_length, truncate
from job.train.lengths import LENGTHS, lengths
from job.train.train_context import TRAIN, TrainContext


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    rows: Sequence[Row]
    """All prepared rows; streamed rows are fetched with their shard on access."""
    measured: Sequence[Row]
    """The same rows with their images' sizes, but possibly without the images' bytes."""
    filtered: FilteredRows
    dataset: EncodedDataset
    statistics: dict[str, Any]
    """The content of `lengths.json`."""


def select_rows(context: TrainContext) -> TrainingRows:
    """Filters the rows by length; rank 0 publishes the label proof and the statistics."""
    spec, family = context.spec, context.family
    measured = context.data.measured_rows()
    rows = context.data.rows("train") if context.data.full_shards else measured
    filtered = filter_by_length(measured, family, spec.data, spec.train)
    encode = functools.partial(encode_truncated, family=family, spec=spec)
    statistics = lengths(filtered.token_counts, spec.train.max_length)
    if process_group.rank() == 0:
        context.train_directory.mkdir(parents=True, exist_ok=True)
        write_label_proof(
            EncodedDataset(measured, filtered, encode), family, context.train_directory
        )
        context.publish(f"{TRAIN}/{LABEL_PROOF}")
        text = as_json(statistics, indent=2) + "\n"
        (context.train_directory / LENGTHS).write_text(text, encoding="utf-8")
        context.publish(f"{TRAIN}/{LENGTHS}")
    return TrainingRows(
        rows=rows,
        measured=measured,
        filtered=filtered,
        dataset=EncodedDataset(rows, filtered, encode),
        statistics=statistics,
    )


def encode_truncated(row: Row, *, family: Family, spec: JobSpec) -> Encoded | None:
    """The row's tokens, within `train.max_length`; None if it is dropped."""
    return truncate(family.encode(row), family, spec.data, spec.train)
