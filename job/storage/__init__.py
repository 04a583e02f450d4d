"""Reads, writes, lists and copies files by URI.

Bare paths, `file://`, `memory://`, `s3://` (keys and endpoint from the AWS environment), `hf://`
and `http(s)://` (both read-only), and any other protocol that fsspec knows. `backends` has a class
for each kind of store, and the table of protocols. A file is visible only when it is complete.
Every function raises InputError for what the user must fix (not found, access denied, unknown
protocol), and StorageError if failures persist or space runs out.

Imports: no other room.
"""

from job.storage.backend import Entry
from job.storage.backends import is_read_only
from job.storage.files import (
    check_access,
    delete,
    download,
    exists,
    glob,
    identity,
    is_file,
    list_files,
    open_read,
    parse_json,
    read_bytes,
    read_text,
    size,
    upload,
    write_bytes,
    write_new,
    write_text,
)
from job.storage.trees import (
    conditions,
    copy_tree,
    delete_tree,
    delete_unfinished,
    download_tree,
    upload_tree,
)
from job.storage.uri import (
    has_glob,
    is_local,
    join,
    local_path,
    name,
    parent,
    resolved_path,
)
from job.storage.write_guard import UNGUARDED, Conditions, Guard

__all__ = [
    "UNGUARDED",
    "Conditions",
    "Entry",
    "Guard",
    "check_access",
    "conditions",
    "copy_tree",
    "delete",
    "delete_tree",
    "delete_unfinished",
    "download",
    "download_tree",
    "exists",
    "glob",
    "has_glob",
    "identity",
    "is_file",
    "is_local",
    "is_read_only",
    "join",
    "list_files",
    "local_path",
    "name",
    "open_read",
    "parent",
    "parse_json",
    "read_bytes",
    "read_text",
    "resolved_path",
    "size",
    "upload",
    "upload_tree",
    "write_bytes",
    "write_new",
    "write_text",
]
