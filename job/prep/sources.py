"""Reads a source's records one by one: jsonl and parquet files, and `builtin://formulas`.

What is read here is still what the user wrote; `job.prep.messages` makes rows of it.
"""

import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job import storage
from job.errors import DataError, InputError
from job.inputs import StagedSource
from job.prep import formulas
from job.spec.types import SourceSpec

MAX_LINE = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record of a source: where it came from and what it says."""

    id: str
    values: Mapping[str, object] | None
    """None where the line itself is unreadable; then `problem` says why."""
    problem: str | None = None


def read(source: StagedSource, spec: SourceSpec) -> Iterator[Record]:
    """The source's records in order: all, the first `limit`, or a random `limit` of them."""
    if source.builtin:
        assert spec.limit is not None, "the spec's validation asks for a limit"
        workers = max(1, (os.cpu_count() or 1))
        for index, sample in enumerate(formulas.samples(spec.formulas, spec.limit, workers)):
            values = {"image": sample.png, "text": sample.latex}
            yield Record(id=f"formulas:{index}", values=values)
        return
    wanted = _chosen(source, spec)
    number = 0
    for name, path in source.files:
        for record in _read_file(name, path, spec.format):
            if wanted is None or number in wanted:
                yield record
            number += 1
            if wanted is None and spec.limit is not None and number >= spec.limit:
                return


def columns(source: StagedSource, spec: SourceSpec) -> tuple[str, ...]:
    """The columns that the source's first readable record has."""
    for name, path in source.files:
        if _format(path, spec.format) == "parquet":
            return tuple(_parquet(name, path).schema_arrow.names)
        for record in _read_file(name, path, spec.format):
            if record.values is not None:
                return tuple(record.values)
    return ()


def count(source: StagedSource, spec: SourceSpec) -> int:
    """How many records `read` will give."""
    if source.builtin:
        return spec.limit or 0
    total = sum(_count_file(name, path, spec.format) for name, path in source.files)
    return total if spec.limit is None else min(total, spec.limit)


def fetch_image(source: StagedSource, path: str) -> bytes:
    """The bytes of an image that a record names, relative to its source's folder.

    Raises OSError for a path that leaves the folder, and for one that cannot be read: the fault
    is the row's, not the job's.
    """
    if "\0" in path:
        raise OSError("the image's path holds a null byte")
    if "://" in path or path.startswith(("/", "\\", "~")) or "\\" in path:
        raise OSError("images are named by a path relative to the folder of their list")
    parts = path.split("/")
    if ".." in parts:
        raise OSError("the image's path leaves the folder of its list")
    if storage.is_local(source.root):
        root = storage.local_path(source.root).resolve()
        file = (root / path).resolve()
        if not file.is_relative_to(root):
            raise OSError("the image is a link that leaves the folder of its list")
        return file.read_bytes()
    try:
        return storage.read_bytes(storage.join(source.root, path))
    except InputError as error:
        raise OSError(error.problems[0].message) from error


def _chosen(source: StagedSource, spec: SourceSpec) -> frozenset[int] | None:
    """The record numbers of a random subset, or None for all in order."""
    if spec.shuffle_seed is None or spec.limit is None:
        return None
    total = sum(_count_file(name, path, spec.format) for name, path in source.files)
    chooser = random.Random(spec.shuffle_seed)  # noqa: S311 - a sample, not a secret
    return frozenset(chooser.sample(range(total), min(spec.limit, total)))


def _format(path: Path, asked: str) -> str:
    if asked != "auto":
        return asked
    return "parquet" if path.suffix == ".parquet" else "jsonl"


def _read_file(name: str, path: Path, asked: str) -> Iterator[Record]:
    return (
        _read_parquet(name, path) if _format(path, asked) == "parquet" else _read_jsonl(name, path)
    )


def _count_file(name: str, path: Path, asked: str) -> int:
    if _format(path, asked) == "parquet":
        return int(_parquet(name, path).metadata.num_rows)
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _read_jsonl(name: str, path: Path) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row_id = f"{name}:{number}"
            try:
                if len(line) > MAX_LINE:
                    raise ValueError(f"the line has {len(line)} bytes, more than {MAX_LINE}")
                values = json.loads(line.decode("utf-8-sig"))
                if not isinstance(values, dict):
                    raise ValueError(f"a line must be a JSON object, found {type(values).__name__}")
                if b"\\u" in line:  # half of a surrogate pair is JSON, and no text
                    json.dumps(values, ensure_ascii=False).encode("utf-8")
            except (ValueError, RecursionError) as error:
                yield Record(id=row_id, values=None, problem=f"unreadable line: {error}")
            else:
                yield Record(id=row_id, values=values)


def _read_parquet(name: str, path: Path) -> Iterator[Record]:
    number = 0
    for batch in _parquet(name, path).iter_batches(batch_size=64):
        for values in batch.to_pylist():
            yield Record(id=f"{name}:{number}", values=values)
            number += 1


def _parquet(name: str, path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            name,
            f"is not a readable parquet file: {error}",
            fix="check that the file was copied whole, or set `format` to what it is",
        ) from error
