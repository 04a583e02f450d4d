"""Finds the files of a data source by its URI, and their formats.

Nothing is downloaded: files are later read as streams.
"""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from job import storage
from job.errors import InputError
from job.local.file_digests import FileDigests
from job.prep.globs import expand_braces, in_split, is_junk, splits_of
from job.prep.source_files import DataSource, Format, SkippedFiles, SourceFile
from job.prep.values import IMAGE_SUFFIXES, TEXT_SUFFIXES
from job.spec.types import FORMULAS, SourceSpec

FORMATS: dict[str, Format] = {
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
_PACKED = (".zip", ".7z", ".rar", ".zst", ".xz", ".bz2", ".lz4")
"""Suffixes that are accepted only if `format` is set."""
_UNSUPPORTED = {
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib"),
        "is a pickle, which can run code when it is read"),
    **dict.fromkeys((".npy", ".npz"), "may contain pickles, which can run code when they are read"),
    **dict.fromkeys(_PACKED[:3], "is an archive of a kind that is not supported"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "is a workbook, which is not supported"),
    **dict.fromkeys(_PACKED[3:], "has a compression that is not supported"),
}  # fmt: skip
NO_FILES = "no files there can be read as rows"
_ABOUT_THE_FOLDER = (
    *("readme", "license", "licence", "copying", "notice", "changelog", "credits", "info", "notes"),
    *("classes", "categories", "labels", "requirements", "train", "val", "valid", "validation"),
    *("test", "trainval", "list", "files", "metadata"),
)
"""Names of texts that lie in folders of images and are the answer of none."""
_NO_IMAGE = "has no image of the same name; add it, or remove the text"
_SECOND_TEXT = "is a second text of its image; remove the one that is not the answer"
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def find_source(
    source: SourceSpec, field: str, local_digests: FileDigests | None = None
) -> DataSource:
    """Finds the source's files; `field` is its path in the spec.

    `local_digests` hashes the files if they are local. Raises InputError if there are none, or if
    access is denied.
    """
    if source.uri == FORMULAS:
        return DataSource(uri=source.uri, files=(), builtin=True)
    uris, by_pattern = _uris(source, field)
    if len(uris) == 1:
        _refuse_unsupported(uris[0], source, field)
    paths = dict(zip(uris, _below_shared_folder(uris), strict=True))
    junk = [path for path in paths.values() if len(paths) > 1 and is_junk(path)]
    data = tuple(uri for uri in uris if not junk or not is_junk(paths[uri]))
    files, others = _select_files(source, data, by_pattern=by_pattern)
    if not files:
        raise InputError(
            f"{field}.uri",
            NO_FILES,
            value=source.uri,
            fix=f"check the path{_start_of(source.uri)}, `split` and `format`",
        )
    for file in files:
        if storage.is_local(file.uri) and not storage.local_path(file.uri).is_file():
            raise InputError(file.uri, "no such file")
    if junk:
        others["left there by systems and tools"] = junk
    skipped = {reason: SkippedFiles.of(names) for reason, names in others.items() if names}
    return DataSource(
        uri=source.uri,
        files=files,
        builtin=False,
        skipped=skipped,
        local_digests=local_digests or FileDigests(),
    )


def _start_of(uri: str) -> str:
    """Where a relative path starts: at the working directory, and not beside the spec."""
    relative = "://" not in uri and not Path(uri).expanduser().is_absolute()
    return f", which starts at {Path.cwd()}" if relative else ""


def splits_in(uri: str) -> tuple[str, ...]:
    """The splits that the names of a folder's files show, sorted; none for a file or a pattern.

    Raises InputError if the folder is missing, or if access is denied.
    """
    if not _is_literal(uri) and (storage.has_glob(uri) or len(expand_braces(uri, "")) > 1):
        return ()
    if storage.is_file(uri):
        return ()
    return _splits(_data_paths([file.path for file in storage.list_files(uri)]))


def _uris(source: SourceSpec, field: str) -> tuple[tuple[str, ...], bool]:
    """The URIs that the source's names, and whether a pattern selected them."""
    literal = _is_literal(source.uri)
    patterns = [source.uri] if literal else expand_braces(source.uri, field)
    if literal or not (len(patterns) > 1 or storage.has_glob(source.uri)):
        return _file_or_folder(source, field), False
    matches: Iterable[Iterable[str]] = (
        storage.glob(pattern) if storage.has_glob(pattern) else (pattern,) for pattern in patterns
    )
    return tuple(chain.from_iterable(matches)), True


def _is_literal(uri: str) -> bool:
    """Whether a URI that could be a pattern is the name of an existing file or folder."""
    # On read-only stores such names are unlikely, and each lookup costs a request.
    if storage.is_read_only(uri) or not (storage.has_glob(uri) or "{" in uri):
        return False
    try:
        return storage.exists(uri)
    except InputError:
        return False  # expanding the pattern will report the error


def _refuse_unsupported(uri: str, source: SourceSpec, field: str) -> None:
    """Raises InputError if the file's suffix is of an unsupported kind."""
    ending = suffix(storage.name(uri))
    reason = _UNSUPPORTED.get(ending)
    if reason and (source.format == "auto" or ending not in _PACKED):
        raise InputError(
            f"{field}.uri",
            reason,
            value=uri,
            fix="store the rows as parquet, JSON Lines, or a tar of image and text pairs",
        )


def suffix(name: str) -> str:
    """The last suffix in lower case, without `.gz`: `.jsonl` for `rows.jsonl.gz`."""
    return "." + name.lower().removesuffix(".gz").rpartition(".")[2]


def _file_or_folder(source: SourceSpec, field: str) -> tuple[str, ...]:
    """The file itself, or the files of the folder (and split) that the URI names.

    Raises InputError if the folder lacks the named split, or has several splits and the source
    names none: training on all of them would include the test rows.
    """
    if storage.is_file(source.uri):
        return (source.uri,)
    paths = [file.path for file in storage.list_files(source.uri)]
    splits = _splits(_data_paths(paths))
    if source.split is None and len(splits) > 1:
        raise InputError(
            f"{field}.split", f"must name one of {', '.join(splits)}", value=source.uri,
            fix=f"write split: {splits[-1]}; a glob reads files of several",
        )  # fmt: skip
    if source.split is not None:
        paths = [path for path in paths if in_split(path, source.split)]
        if not paths and splits:
            raise InputError(
                f"{field}.split", f"does not exist; the folder has {', '.join(splits)}",
                value=source.split, fix=f"write split: {splits[-1]}",
            )  # fmt: skip
    return tuple(storage.join(source.uri, path) for path in paths)


def _data_paths(paths: Iterable[str]) -> list[str]:
    return [p for p in paths if suffix(p) in (*FORMATS, *IMAGE_SUFFIXES) and not is_junk(p)]


def _splits(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({split for path in paths for split in splits_of(path)}))


def _select_files(
    source: SourceSpec, uris: tuple[str, ...], *, by_pattern: bool
) -> tuple[tuple[SourceFile, ...], dict[str, list[str]]]:
    """The files to read as rows, and the names of skipped files by reason.

    With a pattern, a `format` applies to every file.
    """
    names = _short_names(uris)
    if source.format == "imagefolder":
        return _image_folder(uris, names)
    files, others = [], []
    for uri, name in zip(uris, names, strict=True):
        if len(uris) > 1 and _is_metadata(storage.name(uri)):
            continue
        format = FORMATS.get(suffix(name))
        wanted = "arrow" if source.format == "save_to_disk" else source.format
        if wanted == "auto":
            # A single file with an unknown suffix is read as JSON Lines, unless it is an image.
            if format is None and (len(uris) > 1 or suffix(name) in IMAGE_SUFFIXES):
                others.append(name)
                continue
            files.append(SourceFile(name=name, uri=uri, format=format or "jsonl"))
        elif len(uris) == 1 or format == wanted or by_pattern:
            files.append(SourceFile(name=name, uri=uri, format=wanted))
        else:
            others.append(name)
    if source.format == "auto" and not files:
        return _image_folder(uris, names)
    skipped = dict[str, list[str]]()
    formats = {file.format for file in files}
    if source.format == "auto" and "json" in formats and len(formats) > 1:
        # JSON next to other formats is metadata.
        skipped["JSON beside lists of rows"] = [f.name for f in files if f.format == "json"]
        files = [file for file in files if file.format != "json"]
    images = [name for name in others if suffix(name) in IMAGE_SUFFIXES]
    skipped["images, which are read if a list names them"] = images
    skipped["not lists of rows"] = [name for name in others if suffix(name) not in IMAGE_SUFFIXES]
    return tuple(files), skipped


def _is_metadata(name: str) -> bool:
    """Whether the file is metadata of the `datasets` library."""
    return name in _METADATA or name.startswith("cache-")


def _image_folder(
    uris: tuple[str, ...], names: tuple[str, ...]
) -> tuple[tuple[SourceFile, ...], dict[str, list[str]]]:
    """Each image with the text file of its stem. One without the other is a row to reject, but for
    texts whose name says that they are about the folder."""
    texts: dict[str, str] = {}
    for uri in uris:
        if suffix(uri) in TEXT_SUFFIXES:
            texts.setdefault(_stem(uri), uri)
    images = {_stem(uri) for uri in uris if suffix(uri) in IMAGE_SUFFIXES}
    files, about, others = [], [], []
    for uri, name in zip(uris, names, strict=True):
        stem, text_uri = _stem(uri), texts.get(_stem(uri))
        if suffix(uri) in IMAGE_SUFFIXES:
            files.append(SourceFile(name=name, uri=uri, format="imagefolder", text_uri=text_uri))
        elif suffix(uri) not in TEXT_SUFFIXES:
            others.append(name)
        elif stem not in images and storage.name(stem).lower() in _ABOUT_THE_FOLDER:
            about.append(name)
        elif images and (stem not in images or uri != text_uri):
            problem = _SECOND_TEXT if stem in images else _NO_IMAGE
            files.append(
                SourceFile(name=name, uri=uri, format="imagefolder", text_uri=uri, problem=problem)
            )
    return tuple(files), {"texts about the folder": about, "neither images nor texts": others}


def _stem(uri: str) -> str:
    return uri.rpartition(".")[0]


def _short_names(uris: tuple[str, ...]) -> tuple[str, ...]:
    """The files' own names if they all differ, else their paths below the shared folder."""
    names = tuple(storage.name(uri) for uri in uris)
    if len(set(names)) == len(names):
        return names
    return _below_shared_folder(uris)


def _below_shared_folder(uris: tuple[str, ...]) -> tuple[str, ...]:
    """The paths of files below the deepest folder that contains them all."""
    parts = [uri.split("/") for uri in uris]
    shared = 0
    while parts and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return tuple("/".join(p[shared:]) for p in parts)
