"""Reads a source's records, and the files that they name.

`job.prep.messages` builds rows from records.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from urllib.parse import unquote

from job import storage
from job.distributed.cores import cores
from job.errors import InputError
from job.prep import formulas, readers
from job.prep.images import MAX_BYTES
from job.prep.readers import Record, RecordPosition
from job.prep.readers.signatures import LFS_POINTER
from job.prep.source_files import DataSource
from job.spec.types import SourceSpec

_HEAD_RECORDS = 32
MAX_HEAD_RECORDS = 4096
"""Records that are searched for a column that the first ones lack."""
MAX_COUNTED_BYTES = 64 * 2**20
"""Bytes that are read to count records exactly; larger sources are estimated."""


def read(source: DataSource, spec: SourceSpec) -> Iterator[Record]:
    """The source's records in order: all, the first `limit`, or a random `limit` of them."""
    if source.builtin:
        assert spec.limit is not None, "the spec's validation requires a limit"
        workers = cores()
        for number, sample in enumerate(formulas.samples(spec.formulas, spec.limit, workers)):
            yield _formula_record(number, sample)
        return
    chosen = _random_subset(source, spec)
    records = _read_from(source, spec, RecordPosition())
    if chosen is None:
        yield from islice((record for _, record in records), spec.limit)
    else:
        yield from (record for number, record in records if number in chosen)


def reread(
    source: DataSource, spec: SourceSpec, first: RecordPosition, numbers: Sequence[int]
) -> Iterator[Record]:
    """Yields the records with these ascending numbers, as `read` did.

    `first` is the position of the first one.
    """
    if source.builtin:
        yield from (_formula_record(n, formulas.sample(spec.formulas, n)) for n in numbers)
        return
    wanted = numbers if isinstance(numbers, range) else frozenset(numbers)
    for number, record in _read_from(source, spec, first):
        if number in wanted:
            yield record
        if number >= numbers[-1]:
            return


def _formula_record(number: int, sample: formulas.FormulaSample) -> Record:
    values = {"image": sample.png, "text": sample.latex}
    return Record(
        id=f"formulas:{number}", values=values, base="", position=RecordPosition(number=number)
    )


def _read_from(
    source: DataSource, spec: SourceSpec, start: RecordPosition
) -> Iterator[tuple[int, Record]]:
    """Every record from `start` on, with its number and position in the source."""
    number, image_folder = start.number, (spec.image_folder or "").rstrip("/")
    for index, file in enumerate(source.files[start.file :], start.file):
        at_start = index == start.file
        records = readers.read(file, start if at_start else None)
        for in_file, record in enumerate(records, start.in_file if at_start else 0):
            position = RecordPosition(
                number=number, file=index, in_file=in_file, offset=record.offset
            )
            moved = spec.image_folder is not None and record.text_path is None
            base = image_folder if moved else record.base
            yield number, replace(record, position=position, base=base)
            number += 1


def head(source: DataSource, limit: int = _HEAD_RECORDS) -> list[Record]:
    """The first readable records; several, as rows of one source may differ in their columns."""
    return list(islice((r for r in parsed(source) if r.values is not None), limit))


def parsed(source: DataSource) -> Iterator[Record]:
    """All records from the first on, parsed."""
    return (record.parsed() for file in source.files for record in readers.read(file))


def count(source: DataSource, spec: SourceSpec) -> int:
    """How many records `read` yields. Reads text files and archives for it, not tables."""
    if source.builtin:
        return spec.limit or 0
    total = sum(map(readers.count, source.files))
    return total if spec.limit is None else min(total, spec.limit)


def estimate_count(source: DataSource, spec: SourceSpec) -> tuple[int, bool]:
    """How many records `read` yields, and whether that is exact.

    It is estimated if counting would read more than MAX_COUNTED_BYTES.
    """
    files = (file for file in source.files if file.format in readers.ESTIMATED_FORMATS)
    sizes = {file: storage.size(file.uri) for file in files}
    if sum(sizes.values()) <= MAX_COUNTED_BYTES:
        return count(source, spec), True
    others = (file for file in source.files if file not in sizes)
    total = readers.estimate_count(sizes) + sum(map(readers.count, others))
    if spec.limit is not None and total > 2 * spec.limit:
        return spec.limit, True  # the limit is reached even if the estimate is far off
    return total if spec.limit is None else min(total, spec.limit), False


def known_count(source: DataSource, spec: SourceSpec) -> int | None:
    """How many records there are at most; None if counting would download files."""
    cheap = all(storage.is_local(f.uri) or f.format == "imagefolder" for f in source.files)
    return count(source, spec) if cheap else spec.limit


def fetch(base: str, path: str, *, urls: bool = False) -> bytes:
    """The bytes of a file that a record names, in the folder `base`, or at a URL if `urls`.

    Raises OSError, for which only the row is rejected, if the path leaves the folder or cannot be
    read.
    """
    if "\0" in path:
        raise OSError("the image path contains a null byte")
    if urls and path.startswith(("http://", "https://")):
        return _read(path)
    path = relative_to(base, path)
    if path.startswith(("http://", "https://")):
        raise OSError("image URLs are not downloaded; set data.allow_image_urls: true to do so")
    if "://" in path or path.startswith(("/", "\\", "~")) or "\\" in path:
        raise OSError(
            "the image path must be relative to the folder of its list, or to image_folder"
        )
    if ".." in path.split("/"):
        raise OSError("the image path leaves the folder of its list")
    if not base:
        raise OSError("a row of an archive must contain its image, not name it")
    if not storage.is_local(base):
        return _not_a_pointer(_read(storage.join(base, path)))
    root = storage.local_path(base).resolve()
    try:
        file = (root / path).resolve()
    except RuntimeError as error:  # from Python 3.13 on, the file just does not exist
        raise OSError("the image is a symbolic link that leads back to itself") from error
    if not file.is_relative_to(root):
        raise OSError("the image is a link that leaves the folder of its list")
    if not file.is_file() and file.exists() and not file.is_dir():
        raise OSError("the image is not a regular file")
    if not file.exists():
        raise OSError(f"No such file in {base}; set image_folder if images are in another folder")
    with file.open("rb") as opened:
        return _not_a_pointer(opened.read(MAX_BYTES + 1))


def _not_a_pointer(data: bytes) -> bytes:
    if data.startswith(LFS_POINTER):
        raise OSError("the file is a Git LFS pointer: run git lfs pull in its clone")
    return data


def relative_to(base: str, path: str) -> str:
    """An absolute path or URI inside the folder `base` as a relative path; others unchanged."""
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


def _random_subset(source: DataSource, spec: SourceSpec) -> frozenset[int] | None:
    """The numbers of randomly chosen records; None to read all in order."""
    if spec.shuffle_seed is None or spec.limit is None:
        return None
    total = sum(map(readers.count, source.files))
    rng = random.Random(spec.shuffle_seed)  # noqa: S311 - a sample, not a secret
    return frozenset(rng.sample(range(total), min(spec.limit, total)))
