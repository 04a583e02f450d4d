"""Names that people write in place of the ones a spec has, and what to write instead."""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path as FilePath
from typing import Any

from job.spec import keys

# What people call the place of a thing, whichever it is; it is a key of each of these sections.
PLACES = ("dir", "directory", "file", "files", "folder", "location", "path", "source", "src", "url")
PLACED = ("model.model_name_or_path", "data.train.uri", "output.uri")

# Sections under another name; their content is not looked at.
SECTIONS = {
    "evaluation": "eval",
    "peft": "lora",
    "peft_config": "lora",
    "trainer": "train",
    "training": "train",
    "training_args": "train",
}

WORDS_FILE = FilePath(__file__).parent / "schema" / "words.json"
"""What the words of other tools are here: each entry has the `names` that it is about, and one of

- `key`: the same thing under this name, with the same values, or those that `note` says;
- `set`: a key with the value that means the same as the word when it is on;
- `none`: why there is nothing to write.

An entry with `in` is for words inside a section of that name alone.
"""


@dataclass(frozen=True, kw_only=True)
class Word:
    """What is true of a word that another tool has."""

    key: str | None = None
    note: str | None = None
    """Which values the key takes, where they are not those of the word."""
    set: str | None = None
    """`model.dtype: bfloat16`."""
    because: str | None = None
    text: str | None = None
    """The instruction, where it is not made from `key` or `set`."""
    none: str | None = None
    example: Any = None
    """A value that the key takes, where its own example is none of those meant."""


def word(name: str, section: keys.Path = ()) -> Word | None:
    """What is true of the word in that section of a spec; None of a word that nobody knows."""
    plain = _plain(name)
    scopes = [part for part in reversed(section) if isinstance(part, str)]
    return next(filter(None, (words().get((s, plain)) for s in (*scopes, None))), None)


@cache
def words() -> dict[tuple[str | None, str], Word]:
    """Every word in its plain form, by the section that it is meant in, or None for any."""
    found: dict[tuple[str | None, str], Word] = {}
    for entry in json.loads(WORDS_FILE.read_text(encoding="utf-8")):
        scope = entry.pop("in", None)
        names = entry.pop("names")
        said = Word(**entry)
        found |= {(scope, _plain(name)): said for name in names}
    return found


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, where one is like it at all."""
    by_plain = {_plain(other): other for other in known}
    close = difflib.get_close_matches(_plain(name), by_plain, n=1, cutoff=0.7)
    return by_plain[close[0]] if close else None


def typo(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is a slip of the finger away from.

    Names that are merely like each other mean different things: `eval_steps` is no `save_steps`.
    """
    by_plain = {_plain(other): other for other in known}
    typed = _plain(name)
    most = 0 if len(typed) < 3 else 1 if len(typed) < 7 else 2
    for other in difflib.get_close_matches(typed, by_plain, n=3, cutoff=0.6):
        if re.sub(r"\D", "", typed) != re.sub(r"\D", "", other):
            continue  # adam_beta3
        if len(typed) < 4 and len(typed) == len(other) and typed != other:
            continue  # wer is no slip for cer
        if _slips(typed, other) <= most:
            return by_plain[other]
    return None


def instead_of(path: keys.Path, value: Any = None) -> str:
    """What to do about the unknown key at `path`, which has that value, as an instruction."""
    *above, last = path
    name, section = str(last), tuple(above)
    here = list((keys.at(section) or {}).get("properties", {}))
    if known := word(name, section):
        return _told(known, section, value)
    elsewhere = [dotted for dotted in _leaves(section) if dotted.split(".")[-1] == name]
    if elsewhere:
        return _move(section, elsewhere)
    if name.lower() in PLACES and not typo(name, here):
        return _move(section, [at for at in PLACED if at.split(".")[0] in section[:1]] or [*PLACED])
    if not section and name in SECTIONS:
        return f"write {SECTIONS[name]}"
    if close := typo(name, here):
        return f"write {close}"
    leaves = {dotted.split(".")[-1]: dotted for dotted in reversed(_leaves(section))}
    if close := typo(name, leaves):
        return _move(section, [leaves[close]])
    return f"remove it; known here: {', '.join(here)}" if here else "remove it"


def _leaves(section: keys.Path) -> list[str]:
    """The keys that a misplaced one may belong to: those of drawn formulas are for `data` alone."""
    drawn = section[:1] == ("data",)
    return [key for key in keys.dotted_keys() if drawn or ".formulas." not in key]


def _told(known: Word, section: keys.Path, value: Any) -> str:
    """The instruction that a word of another tool leads to, written in that section."""
    if known.none is not None:
        return f"remove it: {known.none}"
    if known.set is not None:
        if not value:  # `use_cpu: false` asks for nothing
            return "remove it: nothing has to be turned off here"
        because = f", {known.because}" if known.because else ""
        return known.text or f"write {known.set}{because}"
    assert known.key is not None, "a word has a key, something to set, or nothing"
    told = _move(section, [known.key])
    return f"{told}, {known.note}" if known.note else told


def quoted(value: Any) -> str:
    """A value as a user would write it, on one line."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return json.dumps(value, default=str)


def _move(section: keys.Path, targets: list[str]) -> str:
    parent = ".".join(part for part in section if isinstance(part, str))
    for target in targets:
        above, _, leaf = target.rpartition(".")
        if above == parent or _twin(above) == parent:
            return f"write {leaf}"
    if section[:2] == ("data", "eval"):  # the keys of one source are those of the other
        targets = [t for t in targets if not t.startswith("data.train.")] or targets
    elif len(targets) > 1:
        targets = [t for t in targets if not t.startswith("data.eval.")] or targets
    return f"move it to {' or '.join(targets)}"


def _twin(above: str) -> str:
    return above.replace("data.train", "data.eval")


def _slips(one: str, other: str) -> int:
    """How many letters have to be put in, left out, changed, or swapped with the next one."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        older, before, row = before, row, [i]
        for j, b in enumerate(other, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                row[j] = min(row[j], older[j - 2] + 1)
    return row[-1]


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]", "", name.lower())
