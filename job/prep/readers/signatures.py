"""What a file is by its first bytes, where that is not what its name or `format` says."""

from job import storage
from job.errors import DataError
from job.prep.discovery import SourceFile

LOOKED_AT = 512
"""Bytes."""
LFS = b"version https://git-lfs.github.com/spec/"
"""How the file begins that stands for another one in a checkout without Git LFS."""
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (LFS, "is a Git LFS pointer, and not the file itself", "git lfs pull, where it was cloned"),
    (b"PAR1", "is a parquet file", "set `format: parquet`"),
    (b"ARROW1", "is an Arrow file", "set `format: arrow`"),
    (b"PK\x03\x04", "is a zip archive or an Excel workbook", "save the rows as CSV or parquet"),
    (b"\x1f\x8b", "is packed by gzip", "let its name end in .gz"),
    (b"\x28\xb5\x2f\xfd", "is packed by zstd", "unpack it: zstd -d"),
    (b"\xfd7zXZ", "is packed by xz", "unpack it: xz -d"),
    (b"BZh", "is packed by bzip2", "unpack it: bzip2 -d"),
    (b"<!doctype", "is a web page", "download the file itself, signed in if it asks for that"),
    (b"<html", "is a web page", "download the file itself, signed in if it asks for that"),
    (b"\xff\xfe", "is UTF-16 text, and UTF-8 is read", "iconv -f UTF-16 -t UTF-8 {} > new"),
    (b"\xfe\xff", "is UTF-16 text, and UTF-8 is read", "iconv -f UTF-16 -t UTF-8 {} > new"),
)
_WIDE = ("is UTF-16 text without a mark of it, and UTF-8 is read",
         "iconv -f UTF-16LE -t UTF-8 {} > new")  # fmt: skip
_TEXTS = ("jsonl", "json", "csv", "tsv")
_OWN = {
    "parquet": (b"PAR1",),
    "arrow": (b"ARROW1",),
    "webdataset": (b"\x1f\x8b", b"BZh", b"\xfd7zXZ"),
}


def refuse(file: SourceFile, begin: bytes) -> None:
    """Raises DataError if the file begins as one of another kind does."""
    known = begin[:64].lower() if begin.lstrip()[:1] == b"<" else begin
    for start, what, fix in _KINDS:
        if known.lstrip().startswith(start) if start[:1] == b"<" else begin.startswith(start):
            raise DataError(file.name, what, fix=fix.format(file.name))
    if file.format in _TEXTS and begin[1::2].count(0) > len(begin) // 3 and 0 not in begin[::2]:
        what, fix = _WIDE
        raise DataError(file.name, what, fix=fix.format(file.name))


def refuse_stored(file: SourceFile) -> None:
    """`refuse` for a file that could not be read as its format, but for how that begins."""
    with storage.open_read(file.uri) as stream:
        begin = stream.read(LOOKED_AT)
    if not begin.startswith(_OWN[file.format]):
        refuse(file, begin)
