"""Converts a chunk of a source's records to one shard of each split.

A chunk is the unit of work of one process, and of resuming: its result, `train-00003.json`, is
written last.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job import storage
from job.prep import control_tokens as control
from job.prep.columns import ReadOptions
from job.prep.convert import to_results
from job.prep.leakage import LeakageBy, NormalizeLabel, RowKeys, row_digest
from job.prep.readers import Record
from job.prep.rows import Reject, Row
from job.prep.shards import ShardWriter, Split
from job.prep.splits import resolve_leakage_by, split_of, splits_of
from job.prep.statistics import Statistics
from job.prep.streaming import Chunk
from job.spec.types import DataSpec

ROWS, BYTES = 1024, 32 * 2**20
"""The size limits of a chunk; fixed, so that shards do not depend on the number of workers."""
SAMPLE = "sample.arrow"
"""A shard of rows with images for the contact sheet, if training rows are stored without."""


@dataclass(frozen=True, kw_only=True)
class SourceTask:
    """How to convert the chunks of one source to shards in `directory`."""

    spec: DataSpec
    split: Split
    options: ReadOptions
    directory: Path
    seed: int
    normalize_label: NormalizeLabel
    classes: bool
    """Whether answers are class labels."""
    leakage_by: LeakageBy | None
    """None until resolved from the first rows of the source."""
    hold_out: bool
    """Whether fractions of this source's rows are held out."""
    source_index: int | None = None
    """Index of the source if there are several to train on."""
    control_tokens: "re.Pattern[str]"
    """The model's control tokens, which no text may contain."""

    @property
    def label(self) -> str:
        """`train`, or `train[1]`."""
        return self.split if self.source_index is None else f"{self.split}[{self.source_index}]"

    def path(self, split: Split, number: int, suffix: str) -> Path:
        index = "" if self.source_index is None else f"{self.source_index:04d}-"
        return self.directory / f"{split}-{index}{number:05d}.{suffix}"

    def result_path(self, number: int) -> Path:
        return self.path(self.split, number, "json")


@dataclass(frozen=True, kw_only=True)
class ChunkResult:
    """The result of converting a chunk, beside its shards."""

    records: int
    leakage_by: LeakageBy
    statistics: dict[Split, Statistics]
    rejects: list[Reject]
    ignored: Counter[str]
    """Rows by ignored column or key."""
    junk_members: int
    chunk: Chunk | None
    """How to read its training rows again, if their image bytes are not stored."""


def split_into_chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += record.size
        if len(chunk) >= ROWS or size >= BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def leakage_by_of_source(task: SourceTask, first: list[Record]) -> LeakageBy:
    results = to_results(first, task.options)
    return resolve_leakage_by(task.spec, task.normalize_label, results, classes=task.classes)


def convert_chunk(task: SourceTask, number: int, records: list[Record]) -> None:
    """Converts one chunk and writes its shards, then its result."""
    if task.source_index is not None:
        records = [replace(each, id=f"{task.label}/{each.id}") for each in records]
    output = _ChunkOutput(task, number)
    rejects, ignored = [], Counter[str]()
    for converted in to_results(records, task.options):
        result = _without_control_tokens(converted, task)
        if isinstance(result, Reject):
            rejects.append(result)
        else:
            ignored.update(result.ignored)
            output.write(result)
    output.close()
    chunk = None
    if task.spec.streaming and "train" in output.writers:
        shard = task.path("train", number, "arrow").name
        chunk = Chunk.of(shard, task.source_index or 0, records)
    result_json = {
        "records": len(records),
        "chunk": chunk.to_json() if chunk else None,
        "statistics": {split: each.to_json() for split, each in output.statistics.items()},
        "unread": ignored,
        "passed_over": sum(record.junk_members for record in records),
        "rejects": [[reject.id, reject.reason] for reject in rejects],
    }
    storage.write_text(str(task.result_path(number)), json.dumps(result_json))


def _without_control_tokens(result: Row | Reject, task: SourceTask) -> Row | Reject:
    """A row unchanged, or a reject if its text contains a control token."""
    if isinstance(result, Row) and (token := control.find(result.messages, task.control_tokens)):
        return Reject(id=result.id, reason=f"{control.FOUND}: {token}")
    return result


class _ChunkOutput:
    """The shards of one chunk, opened when their first row is written, and their statistics."""

    def __init__(self, task: SourceTask, number: int) -> None:
        self._task, self._number = task, number
        self.writers: dict[Split, ShardWriter] = {}
        self.statistics: dict[Split, Statistics] = {
            split: Statistics() for split in splits_of(task.spec)
        }
        first = task.split == "train" and not task.source_index and number == 0
        sampled = task.spec.streaming and first
        self._sample = ShardWriter(task.directory / SAMPLE) if sampled else None

    def write(self, row: Row) -> None:
        task = self._task
        assert task.leakage_by is not None, "resolved before the first chunk"
        keys = RowKeys(row, task.normalize_label, task.leakage_by)
        split = task.split
        if task.hold_out:
            split = split_of(keys.split_group, task.spec, task.seed)
        if split not in self.writers:
            path = task.path(split, self._number, "arrow")
            image_bytes = split != "train" or not task.spec.streaming
            self.writers[split] = ShardWriter(path, image_bytes=image_bytes)
        own_keys = keys.train_keys if split == "train" else keys.eval_keys
        digest = row_digest(row)
        self.writers[split].write(row, own_keys, digest)
        self.statistics[split].add(row)
        if self._sample is not None and split == "train":
            self._sample.write(row, own_keys, digest)

    def close(self) -> None:
        for writer in [*self.writers.values(), *([self._sample] if self._sample else [])]:
            writer.close()


def read_result(task: SourceTask, number: int) -> ChunkResult:
    """The result of a converted chunk, from its result file."""
    assert task.leakage_by is not None
    result_json: dict[str, Any] = json.loads(task.result_path(number).read_text(encoding="utf-8"))
    return ChunkResult(
        records=result_json["records"],
        leakage_by=task.leakage_by,
        statistics={
            split: Statistics.from_json(s) for split, s in result_json["statistics"].items()
        },
        rejects=[Reject(id=row_id, reason=reason) for row_id, reason in result_json["rejects"]],
        ignored=Counter(result_json["unread"]),
        junk_members=result_json["passed_over"],
        chunk=Chunk.from_json(result_json["chunk"]) if result_json["chunk"] else None,
    )
