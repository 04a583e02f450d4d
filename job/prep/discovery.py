"""Finds a data source by its URI: its files, how rows are stored in them, and what identifies it.

Nothing is downloaded: files are read where they are, as a stream.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Literal, cast

from job import storage
from job.errors import InputError
from job.prep.globs import braces, in_split, is_junk, splits_of
from job.prep.values import IMAGE_SUFFIXES, TEXT_SUFFIXES
from job.spec.types import FORMULAS, SourceSpec
from job.storage.digests import fingerprint, sha256_file

Format = Literal[
    "jsonl", "json", "csv", "tsv", "parquet", "arrow", "imagefolder", "webdataset", "builtin"
]
LISTS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".tgz": "webdataset",
}
PICTURES = IMAGE_SUFFIXES
TEXTS = TEXT_SUFFIXES
REFUSED = {
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"),
        "is a pickle, which runs code when it is read"),
    **dict.fromkeys((".npy", ".npz"), "may hold pickles, which run code when they are read"),
    **dict.fromkeys((".zip", ".7z", ".rar"), "is an archive, which is not unpacked"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "is a workbook, which is not read"),
    **dict.fromkeys((".zst", ".xz", ".bz2", ".lz4"), "is packed in a way that is not read"),
}  # fmt: skip
ORPHANS = "texts without an image of the same name"
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SAMPLE = 4096  # bytes read from either end of a picture to tell it from another


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file to read; for an `imagefolder`, one picture and where its text is."""

    name: str
    """For messages and row ids: relative to the folder that all files share."""
    uri: str
    format: Format
    text_uri: str | None = None


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """Files that make no row."""

    files: int
    first: str

    @classmethod
    def of(cls, names: Sequence[str]) -> "PassedOver":
        return cls(files=len(names), first=names[0])


@dataclass(frozen=True, kw_only=True)
class StagedSource:
    """A data source found; its rows and images are read when asked for."""

    uri: str
    files: tuple[SourceFile, ...]
    builtin: bool
    passed_over: Mapping[str, PassedOver] = field(default_factory=dict, compare=False)
    """Files of the folder that make no row, by why not."""

    @cached_property
    def digest(self) -> str:
        """Of the contents of local lists; of names, sizes and versions where a store tells those.

        Lists may be read through for it, so not before it is asked for.
        """
        return FORMULAS if self.builtin else fingerprint(_identities(self.files))


def stage_source(source: SourceSpec, place: str) -> StagedSource:
    """Finds the source's files.

    `place` is that of the source in the spec. Raises InputError where nothing is found or access
    is denied.
    """
    if source.uri == FORMULAS:
        return StagedSource(uri=source.uri, files=(), builtin=True)
    literal = _is_literal(source.uri)
    patterns = [source.uri] if literal else braces(source.uri, place)
    chosen = not literal and (len(patterns) > 1 or storage.has_glob(source.uri))
    if chosen:
        every = (storage.glob(one) if storage.has_glob(one) else (one,) for one in patterns)
        uris = tuple(chain.from_iterable(every))
    else:
        uris = _members(source, place)
    for uri in uris if len(uris) == 1 else ():
        if (reason := REFUSED.get(suffix(storage.name(uri)))) and (
            source.format == "auto" or "packed" not in reason
        ):
            raise InputError(
                f"{place}.uri", reason, value=uri,
                fix="store the rows as parquet, as lines of JSON, or as a tar of pairs",
            )  # fmt: skip
    below = dict(zip(uris, _below(uris), strict=True))
    junk = [path for path in below.values() if len(below) > 1 and is_junk(path)]
    rows = tuple(uri for uri in uris if not junk or not is_junk(below[uri]))
    files, others = _files(source, rows, chosen=chosen)
    if not files:
        raise InputError(
            f"{place}.uri",
            "nothing is there that can be read as rows",
            value=source.uri,
            fix="check the path, `split` and `format`",
        )
    for file in files:
        if storage.is_local(file.uri) and not storage.local_path(file.uri).is_file():
            raise InputError(file.uri, "there is no such file")
    if junk:
        others["left there by systems and tools"] = junk
    passed = {why: PassedOver.of(names) for why, names in others.items() if names}
    return StagedSource(uri=source.uri, files=files, builtin=False, passed_over=passed)


def _is_literal(uri: str) -> bool:
    """Whether a URI that could be a pattern names what is there: then that is meant."""
    # What can only be read is named by those who made it, and each look costs a request.
    if storage.is_read_only(uri) or not (storage.has_glob(uri) or "{" in uri):
        return False
    try:
        return storage.exists(uri)
    except InputError:
        return False  # whoever lists the matches of the pattern says what is wrong


def suffix(name: str) -> str:
    """The last ending in lower case, below `.gz`: `.jsonl` for `rows.jsonl.gz`."""
    return "." + name.lower().removesuffix(".gz").rpartition(".")[2]


def _members(source: SourceSpec, field: str) -> tuple[str, ...]:
    """The file itself, or where the URI names a folder, what is in it (of the split).

    Raises InputError where the folder has not that split, or has several and none is named: whoever
    trains on all of them has seen the rows of the test.
    """
    if storage.is_file(source.uri):
        return (source.uri,)
    paths = [file.path for file in storage.list_files(source.uri)]
    rows = [p for p in paths if suffix(p) in (*LISTS, *PICTURES) and not is_junk(p)]
    splits = sorted({split for path in rows for split in splits_of(path)})
    if source.split is None and len(splits) > 1:
        raise InputError(
            f"{field}.split", f"must name one of {', '.join(splits)}", value=source.uri,
            fix=f"write split: {splits[-1]}; a glob reads files of several",
        )  # fmt: skip
    if source.split is not None:
        paths = [path for path in paths if in_split(path, source.split)]
        if not paths and splits:
            raise InputError(
                f"{field}.split", f"is not there; the folder has {', '.join(splits)}",
                value=source.split, fix=f"write split: {splits[-1]}",
            )  # fmt: skip
    return tuple(storage.join(source.uri, path) for path in paths)


def _files(
    source: SourceSpec, uris: tuple[str, ...], *, chosen: bool
) -> tuple[tuple[SourceFile, ...], dict[str, list[str]]]:
    """Those of the files that hold rows, and the names of the others by why not; all of them if
    they were `chosen` by a pattern."""
    names = _names(uris)
    if source.format == "imagefolder":
        return _pairs(uris, names)
    found, others = [], []
    for uri, name in zip(uris, names, strict=True):
        known = LISTS.get(suffix(name))
        wanted = "arrow" if source.format == "save_to_disk" else source.format
        if len(uris) > 1 and (
            storage.name(uri) in _ABOUT or storage.name(uri).startswith("cache-")
        ):
            continue  # what `datasets` keeps beside its rows
        if wanted == "auto":
            # A single file of another name has always been taken for lines of JSON.
            if known is None and len(uris) > 1:
                others.append(name)
                continue
            found.append(SourceFile(name=name, uri=uri, format=known or "jsonl"))
        elif len(uris) == 1 or known == wanted or chosen:
            found.append(SourceFile(name=name, uri=uri, format=wanted))
        else:
            others.append(name)
    if source.format == "auto" and not found:
        return _pairs(uris, names)
    passed = dict[str, list[str]]()
    kinds = {file.format for file in found}
    if source.format == "auto" and "json" in kinds and len(kinds) > 1:
        # Those tell about the others.
        passed["JSON beside lists of rows"] = [f.name for f in found if f.format == "json"]
        found = [file for file in found if file.format != "json"]
    images = [name for name in others if suffix(name) in PICTURES]
    passed["images, which are read if a list names them"] = images
    passed["not lists of rows"] = [name for name in others if suffix(name) not in PICTURES]
    return tuple(found), passed


def _pairs(
    uris: tuple[str, ...], names: tuple[str, ...]
) -> tuple[tuple[SourceFile, ...], dict[str, list[str]]]:
    """An image and the text of the same stem beside it make a row; a text without is told."""
    texts: dict[str, str] = {}
    for uri in uris:
        if suffix(uri) in TEXTS:
            texts.setdefault(uri.rpartition(".")[0], uri)
    found = tuple(
        SourceFile(
            name=name, uri=uri, format="imagefolder", text_uri=texts.get(uri.rpartition(".")[0])
        )
        for uri, name in zip(uris, names, strict=True)
        if suffix(uri) in PICTURES
    )
    used = {file.text_uri for file in found}
    orphans, others = [], []
    for uri, name in zip(uris, names, strict=True):
        if suffix(uri) in TEXTS and uri not in used:
            orphans.append(name)
        elif suffix(uri) not in (*TEXTS, *PICTURES):
            others.append(name)
    return found, {ORPHANS: orphans, "neither images nor texts": others}


def _names(uris: tuple[str, ...]) -> tuple[str, ...]:
    """Short names that differ: the files' own, or the paths below the folder that all share."""
    short = tuple(storage.name(uri) for uri in uris)
    if len(set(short)) == len(short):
        return short
    return _below(uris)


def _below(uris: tuple[str, ...]) -> tuple[str, ...]:
    """The paths of files below the folder that all of them share."""
    parts = [uri.split("/") for uri in uris]
    shared = 0
    while parts and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return tuple("/".join(p[shared:]) for p in parts)


def _identities(files: tuple[SourceFile, ...]) -> list[object]:
    if storage.is_local(files[0].uri):
        return [(file.name, _local_identity(file)) for file in files]
    entries = {}
    for folder in {storage.parent(file.uri) for file in files}:
        if not folder.startswith(("http://", "https://")):
            for entry in storage.list_files(folder):
                entries[storage.join(folder, entry.path)] = entry
    found: list[object] = []
    for file in files:
        wanted = [file.uri, *([file.text_uri] if file.text_uri else [])]
        known = [entries.get(each) for each in wanted]
        if all(entry is not None and entry.version is not None for entry in known):
            found.append([(e.path, e.size, e.version) for e in known if e is not None])
        else:  # the store tells no versions: the contents have to
            found.append([(file.name, _sha256(each)) for each in wanted])
    return found


def _local_identity(file: SourceFile) -> object:
    path = storage.local_path(file.uri)
    if file.format != "imagefolder":
        return sha256_file(path)
    text = sha256_file(storage.local_path(file.text_uri)) if file.text_uri else None
    return [sample_digest(file.uri), text]


def sample_digest(uri: str) -> str:
    """A local file's size with its first and last 4 KiB, hashed: cheap, whatever its date.

    Raises OSError where it cannot be read.
    """
    path = storage.local_path(uri)
    with path.open("rb") as file:
        size = path.stat().st_size
        head = file.read(_SAMPLE)
        file.seek(max(0, size - _SAMPLE))
        return hashlib.blake2b(b"%d " % size + head + file.read(), digest_size=16).hexdigest()


def _sha256(uri: str) -> str:
    with storage.open_read(uri) as file:
        return hashlib.file_digest(cast(io.BufferedIOBase, file), "sha256").hexdigest()
