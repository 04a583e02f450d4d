"""A source's records one by one: of all its files in order, the first or a random few of them.

What is read here is still what the user wrote; `job.prep.messages` makes rows of it.
"""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from urllib.parse import unquote

from job import storage
from job.errors import InputError
from job.prep import formulas, readers
from job.prep.discovery import StagedSource
from job.prep.images import MAX_BYTES
from job.prep.readers import Record, RecordPosition
from job.prep.readers.contents import LFS
from job.spec.types import SourceSpec

_HEAD = 32
FURTHER = 4096
"""Records that are looked at for a column that the first have not."""
LARGE = 64 * 2**20
"""Bytes that are read through to count records, where about as many will do, at most."""


def read(source: StagedSource, spec: SourceSpec) -> Iterator[Record]:
    """The source's records in order: all, the first `limit`, or a random `limit` of them."""
    if source.builtin:
        assert spec.limit is not None, "the spec's validation asks for a limit"
        workers = max(1, (os.cpu_count() or 1))
        for number, sample in enumerate(formulas.samples(spec.formulas, spec.limit, workers)):
            yield _drawn(number, sample)
        return
    wanted = _chosen(source, spec)
    if wanted is None:
        yield from islice(_from(source, spec, RecordPosition()), spec.limit)
        return
    for record in _from(source, spec, RecordPosition()):
        assert record.place is not None, "its place is known"
        if record.place.number in wanted:
            yield record


def read_again(
    source: StagedSource, spec: SourceSpec, first: RecordPosition, numbers: Sequence[int]
) -> Iterator[Record]:
    """The records with these numbers, in rising order, that `read` gave before; `first` is the
    place of the first."""
    if source.builtin:
        yield from (_drawn(n, formulas.sample(spec.formulas, n)) for n in numbers)
        return
    wanted = numbers if isinstance(numbers, range) else frozenset(numbers)
    for record in _from(source, spec, first):
        assert record.place is not None, "its place is known"
        if record.place.number in wanted:
            yield record
        if record.place.number >= numbers[-1]:
            return


def _drawn(number: int, sample: formulas.FormulaSample) -> Record:
    values = {"image": sample.png, "text": sample.latex}
    return Record(
        id=f"formulas:{number}", values=values, base="", place=RecordPosition(number=number)
    )


def _from(source: StagedSource, spec: SourceSpec, start: RecordPosition) -> Iterator[Record]:
    """Every record from `start` on, with its place."""
    number, base = start.number, (spec.image_folder or "").rstrip("/")
    for index, file in enumerate(source.files[start.file :], start.file):
        skipped = start.in_file if index == start.file else 0
        for in_file, record in enumerate(
            readers.read(file, start if index == start.file else None), skipped
        ):
            place = RecordPosition(number=number, file=index, in_file=in_file, offset=record.offset)
            moved = spec.image_folder is not None and record.text_path is None
            yield replace(record, place=place, base=base if moved else record.base)
            number += 1


def head(source: StagedSource, most: int = _HEAD) -> list[Record]:
    """The first readable records, a few: rows of one source need not all have the same columns."""
    return list(islice((r for r in first(source) if r.values is not None), most))


def first(source: StagedSource) -> Iterator[Record]:
    """The records from the first on, parsed."""
    return (record.parsed() for file in source.files for record in readers.read(file))


def count(source: StagedSource, spec: SourceSpec) -> int:
    """How many records `read` will give. Lists are read through for it, tables are not."""
    if source.builtin:
        return spec.limit or 0
    total = sum(map(readers.count, source.files))
    return total if spec.limit is None else min(total, spec.limit)


def about(source: StagedSource, spec: SourceSpec) -> tuple[int, bool]:
    """How many records `read` will give, and whether that is counted.

    Where counting would read through many bytes it is estimated from the first of them.
    """
    large = (file for file in source.files if file.format in readers.READ_THROUGH)
    sizes = {file: storage.size(file.uri) for file in large}
    if sum(sizes.values()) <= LARGE:
        return count(source, spec), True
    others = (file for file in source.files if file not in sizes)
    total = readers.about(sizes) + sum(map(readers.count, others))
    if spec.limit is not None and total > 2 * spec.limit:
        return spec.limit, True  # however far off the estimate is
    return total if spec.limit is None else min(total, spec.limit), False


def known_count(source: StagedSource, spec: SourceSpec) -> int | None:
    """How many records there are at most; None where to tell would take a download."""
    cheap = all(storage.is_local(f.uri) or f.format == "imagefolder" for f in source.files)
    return count(source, spec) if cheap else spec.limit


def fetch(base: str, path: str, *, urls: bool = False) -> bytes:
    """The bytes of a file that a record names, in the folder `base`; of a web URL if `urls` allows
    it.

    Raises OSError for a path that leaves the folder, and for one that cannot be read: the fault
    is the row's, not the job's.
    """
    if "\0" in path:
        raise OSError("the image's path holds a null byte")
    if urls and path.startswith(("http://", "https://")):
        return _read(path)
    path = from_folder(base, path)
    if path.startswith(("http://", "https://")):
        raise OSError("images by URL are fetched only with data.allow_image_urls: true")
    if "://" in path or path.startswith(("/", "\\", "~")) or "\\" in path:
        raise OSError(
            "images lie in the folder of their list, or in image_folder, and are named from there"
        )
    if ".." in path.split("/"):
        raise OSError("the image's path leaves the folder of its list")
    if not base:
        raise OSError("rows of an archive hold their images; they name none")
    if storage.is_local(base):
        root = storage.local_path(base).resolve()
        file = (root / path).resolve()
        if not file.is_relative_to(root):
            raise OSError("the image is a link that leaves the folder of its list")
        if not file.is_file() and file.exists() and not file.is_dir():
            raise OSError("the image is no plain file")
        if not file.exists():
            raise OSError(f"No such file in {base or '.'}; image_folder can name another folder")
        with file.open("rb") as opened:
            return _whole(opened.read(MAX_BYTES + 1))
    return _whole(_read(storage.join(base, path)))


def _whole(data: bytes) -> bytes:
    if data.startswith(LFS):
        raise OSError("the file is a Git LFS pointer: git lfs pull, where it was cloned")
    return data


def from_folder(base: str, path: str) -> str:
    """A path that is named in full, as one from the folder `base` if it lies there."""
    if base and storage.is_local(base):
        if path.startswith("file://"):
            path = unquote(path.removeprefix("file://").removeprefix("localhost"))
        if path.startswith("/"):
            folder = storage.local_path(base)
            return path.removeprefix(f"{folder.absolute()}/").removeprefix(f"{folder.resolve()}/")
    return path.removeprefix(f"{base}/") if "://" in path else path


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri, MAX_BYTES + 1)
    except InputError as error:
        raise OSError(error.problems[0].message) from error


def _chosen(source: StagedSource, spec: SourceSpec) -> frozenset[int] | None:
    """The record numbers of a random subset, or None for all in order."""
    if spec.shuffle_seed is None or spec.limit is None:
        return None
    total = sum(map(readers.count, source.files))
    chooser = random.Random(spec.shuffle_seed)  # noqa: S311 - a sample, not a secret
    return frozenset(chooser.sample(range(total), min(spec.limit, total)))
