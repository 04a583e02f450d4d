"""What to do about a path of this machine that is not what it should be."""

import difflib
from contextlib import suppress
from pathlib import Path

MOST_NAMES = 10_000
"""Of a folder, to look for a similar name among."""


def fix_missing(path: Path) -> str:
    """Names the similar path that exists, or the folder where the search for `path` ended."""
    for missing in (path, *path.parents):
        folder = missing.parent
        if folder.is_dir() and not missing.exists():
            similar = _similar(missing.name, folder)
            if similar and (meant := folder / similar / path.relative_to(missing)).exists():
                return f"write {meant}, if that is meant"
            return (
                f"check the path: there is no {missing.name} in {folder.absolute()}; if it is on "
                "a volume, mount that"
            )
    return "check the path, and that its volume is mounted"


def fix_invalid(path: Path) -> str | None:
    """What to do if `path` is a folder instead of a file, or is below a file."""
    if path.is_dir():
        return "name a file in this folder"
    file = next((each for each in (path, *path.parents) if each.is_file()), None)
    return None if file is None else f"name another path: {file} is a file, not a folder"


def _similar(name: str, folder: Path) -> str | None:
    """The name in `folder` that is most like `name`, if any is like it."""
    names = list[str]()
    with suppress(OSError):
        names = [each.name for each, _ in zip(folder.iterdir(), range(MOST_NAMES), strict=False)]
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.7)), None)
