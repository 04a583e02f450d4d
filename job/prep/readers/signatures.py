"""Identifies files by their first bytes if these do not match their name or `format`."""

from job import storage
from job.errors import DataError
from job.prep.source_files import SourceFile

HEAD_BYTES = 512
"""Bytes that identify a file."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The start of the file that a checkout without Git LFS has in place of the real one."""
_HTML_FIX = "download the file itself, signed in if it asks for that"
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (LFS_POINTER, "is a Git LFS pointer, not the file itself", "run git lfs pull in its clone"),
    (b"PAR1", "is a parquet file", "set `format: parquet`"),
    (b"ARROW1", "is an Arrow file", "set `format: arrow`"),
    (b"PK\x03\x04", "is a zip archive or an Excel workbook", "save the rows as CSV or parquet"),
    (b"\x1f\x8b", "is compressed with gzip", "rename it to end in .gz"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", "decompress it: zstd -d"),
    (b"\xfd7zXZ", "is compressed with xz", "decompress it: xz -d"),
    (b"BZh", "is compressed with bzip2", "decompress it: bzip2 -d"),
    (b"<!doctype", "is a web page", _HTML_FIX),
    (b"<html", "is a web page", _HTML_FIX),
    (b"\xff\xfe", "is UTF-16 text, but must be UTF-8", "iconv -f UTF-16 -t UTF-8 {} > new"),
    (b"\xfe\xff", "is UTF-16 text, but must be UTF-8", "iconv -f UTF-16 -t UTF-8 {} > new"),
)
_UTF16_WITHOUT_BOM = (
    "is UTF-16 text without a byte order mark, but must be UTF-8",
    "iconv -f UTF-16LE -t UTF-8 {} > new",
)
_TEXT_FORMATS = ("jsonl", "json", "csv", "tsv")
_OWN_SIGNATURES = {
    "parquet": (b"PAR1",),
    "arrow": (b"ARROW1",),
    "webdataset": (b"\x1f\x8b", b"BZh", b"\xfd7zXZ"),
}


def refuse_mismatch(file: SourceFile, head: bytes) -> None:
    """Raises DataError if `head`, the file's first bytes, are those of another kind of file."""
    html = head[:64].lower().lstrip()
    for signature, what, fix in _SIGNATURES:
        start = html if signature[:1] == b"<" else head
        if start.startswith(signature):
            raise DataError(file.name, what, fix=fix.format(file.name))
    if file.format in _TEXT_FORMATS and head[1::2].count(0) > len(head) // 3 and 0 not in head[::2]:
        what, fix = _UTF16_WITHOUT_BOM
        raise DataError(file.name, what, fix=fix.format(file.name))


def refuse_unreadable(file: SourceFile) -> None:
    """`refuse_mismatch` for a file that its reader failed on, unless its first bytes match."""
    with storage.open_read(file.uri) as stream:
        head = stream.read(HEAD_BYTES)
    if not head.startswith(_OWN_SIGNATURES[file.format]):
        refuse_mismatch(file, head)
