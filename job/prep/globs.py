"""File names: brace patterns, junk files, and the splits that names stand for."""

import re

from job.errors import InputError

SPLITS = ("dev", "eval", "test", "train", "val", "validation")
"""Usual split names in file and folder names."""
MAX_FILES = 100_000
"""Files that a brace pattern may expand to."""
_JUNK = (
    "__MACOSX",
    ".ipynb_checkpoints",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "@eaDir",
    ".git",
)
_BRACES = re.compile(r"\{(?:(\d{1,6})\.\.(\d{1,6})|([^{},]*(?:,[^{},]*)+))\}")


def expand_braces(pattern: str, field: str) -> list[str]:
    """Expands braces as a shell does: `{00..12}` to numbers, `{a,b}` to each word.

    Raises InputError if the pattern expands to more than MAX_FILES.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    parts = words.split(",") if words else []
    if not words:
        parts = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    expanded = list[str]()
    for part in parts:
        expanded += expand_braces(pattern[: match.start()] + part + pattern[match.end() :], field)
        if len(expanded) > MAX_FILES:
            raise InputError(f"{field}.uri", f"expands to more than {MAX_FILES:,} files",
                             value=pattern, fix="check the numbers in braces")  # fmt: skip
    return expanded


def is_junk(path: str) -> bool:
    """Whether the file was left by a system or tool: `._a.png`, `__MACOSX/`, `Thumbs.db`."""
    return any(part.startswith("._") or part in _JUNK for part in path.split("/"))


def in_split(path: str, split: str) -> bool:
    """Whether a folder is named after the split, or the file's name contains it as a word."""
    *folders, name = path.split("/")
    word = rf"(?<![0-9A-Za-z]){re.escape(split)}(?![0-9A-Za-z])"
    return split in folders or re.search(word, name) is not None


def splits_of(path: str) -> list[str]:
    """The usual split names that occur in a path."""
    return [split for split in SPLITS if in_split(path, split)]
