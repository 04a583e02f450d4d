"""What the names of files say: patterns with braces, and which split a file belongs to."""

import re

from job.errors import InputError

SPLITS = ("dev", "eval", "test", "train", "val", "validation")
"""Names by which files that belong to different splits are told apart."""
MOST_FILES = 100_000
"""That a pattern with braces may stand for."""
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


def braces(pattern: str, field: str) -> list[str]:
    """What a pattern of shells stands for: `{00..12}` for numbers, `{a,b}` for each of the words.

    Raises InputError where that is more than anyone means.
    """
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    first, last, words = found.groups()
    parts = words.split(",") if words else []
    if not words:
        parts = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    expanded = list[str]()
    for part in parts:
        expanded += braces(pattern[: found.start()] + part + pattern[found.end() :], field)
        if len(expanded) > MOST_FILES:
            raise InputError(f"{field}.uri", f"stands for more than {MOST_FILES:,} files",
                             value=pattern, fix="check the numbers in braces")  # fmt: skip
    return expanded


def is_junk(path: str) -> bool:
    """Whether systems and tools left it beside data: `._a.png`, `__MACOSX/`, `Thumbs.db`."""
    return any(part.startswith("._") or part in _JUNK for part in path.split("/"))


def in_split(path: str, split: str) -> bool:
    """Whether a folder has the split's name, or the file's name has it as a word."""
    *folders, name = path.split("/")
    word = rf"(?<![0-9A-Za-z]){re.escape(split)}(?![0-9A-Za-z])"
    return split in folders or re.search(word, name) is not None


def splits_of(path: str) -> list[str]:
    """The usual names of splits that a path has."""
    return [split for split in SPLITS if in_split(path, split)]
