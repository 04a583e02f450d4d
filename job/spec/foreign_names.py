"""Names of other tools' settings, and typos, with the spec's keys that they stand for."""

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path as FilePath
from typing import Any

from job.spec import keys

# Common names for a location; the keys below are the ones that take a location.
LOCATION_NAMES = (
    "dir",
    "directory",
    "file",
    "files",
    "folder",
    "location",
    "path",
    "source",
    "src",
    "url",
)
LOCATION_KEYS = ("model.model_name_or_path", "data.train.uri", "output.uri")

# Other tools' names for sections. Keys inside such a section are not checked.
SECTIONS = {
    "evaluation": "eval",
    "grpo": "reinforce",
    "peft": "lora",
    "peft_config": "lora",
    "trainer": "train",
    "training": "train",
    "training_args": "train",
}

_HELD_OUT = ("data.eval", "data.validation")  # sources with the keys of data.train

FOREIGN_NAMES_FILE = FilePath(__file__).parent / "schema" / "foreign_names.json"
"""Keys of other tools and their equivalents. Each entry has `names`, and one of

- `key`: the equivalent key; it takes the same values unless `note` lists others;
- `set`: a key and value equivalent to turning the option on;
- `none`: why the spec has no such key.

An entry with `in` applies only inside a section of that name.
"""


@dataclass(frozen=True, kw_only=True)
class ForeignName:
    """The equivalent of another tool's key: an entry of `FOREIGN_NAMES_FILE`."""

    key: str | None = None
    note: str | None = None
    """The values of the key, if they differ from those of the other tool."""
    set: str | None = None
    """A key with its value, such as `model.dtype: bfloat16`."""
    because: str | None = None
    """A remark on `set`."""
    text: str | None = None
    """The whole instruction, instead of one built from `set`."""
    none: str | None = None
    """Why the spec has no equivalent key."""
    example: Any = None
    """A valid value for the key, if the schema's example is unsuitable; for tests."""


def foreign_name(name: str, section: keys.Path = ()) -> ForeignName | None:
    """The entry for a name used in `section` of a spec; None if there is none."""
    normalized = _normalized(name)
    scopes = [part for part in reversed(section) if isinstance(part, str)]
    return next(filter(None, (foreign_names().get((s, normalized)) for s in (*scopes, None))), None)


@cache
def foreign_names() -> dict[tuple[str | None, str], ForeignName]:
    """All entries, by section (None: any section) and normalized name."""
    entries: dict[tuple[str | None, str], ForeignName] = {}
    for entry in json.loads(FOREIGN_NAMES_FILE.read_text(encoding="utf-8")):
        scope = entry.pop("in", None)
        names = entry.pop("names")
        entries |= {(scope, _normalized(name)): ForeignName(**entry) for name in names}
    return entries


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most similar to `name`, if any is similar."""
    by_normalized = {_normalized(other): other for other in known}
    close = difflib.get_close_matches(_normalized(name), by_normalized, n=1, cutoff=0.7)
    return by_normalized[close[0]] if close else None


def typo(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is a typo of, if any.

    Stricter than `nearest`: similar names may mean different things (`eval_steps`, `save_steps`).
    """
    from rapidfuzz.distance import OSA

    by_normalized = {_normalized(other): other for other in known}
    typed = _normalized(name)
    most = 0 if len(typed) < 3 else 1 if len(typed) < 7 else 2
    for other in difflib.get_close_matches(typed, by_normalized, n=3, cutoff=0.6):
        if re.sub(r"\D", "", typed) != re.sub(r"\D", "", other):
            continue  # adam_beta3
        if len(typed) < 4 and len(typed) == len(other) and typed != other:
            continue  # wer is not a typo of cer
        if OSA.distance(typed, other) <= most:
            return by_normalized[other]
    return None


def fix_for_unknown_key(path: keys.Path, value: object = None) -> str:
    """The fix for the unknown key at `path`, given the value that it was set to."""
    *above, last = path
    name, section = str(last), tuple(above)
    here = list((keys.at(section) or {}).get("properties", {}))
    if known := foreign_name(name, section):
        return _instruction(known, section, value)
    elsewhere = [dotted for dotted in _leaves(section) if dotted.split(".")[-1] == name]
    if elsewhere:
        return _move(section, elsewhere)
    if name.lower() in LOCATION_NAMES and not typo(name, here):
        return _move(
            section,
            [at for at in LOCATION_KEYS if at.split(".")[0] in section[:1]] or [*LOCATION_KEYS],
        )
    if not section and name in SECTIONS:
        return f"write {SECTIONS[name]}"
    if close := typo(name, here):
        return f"write {close}"
    leaves = {dotted.split(".")[-1]: dotted for dotted in reversed(_leaves(section))}
    if close := typo(name, leaves):
        return _move(section, [leaves[close]])
    return f"remove it; valid keys: {', '.join(here)}" if here else "remove it"


def _leaves(section: keys.Path) -> list[str]:
    """The keys to suggest for a misplaced key.

    Those of `formulas` only inside `data`, and those of `reinforce` that another section has too
    only inside `reinforce`.
    """
    hidden = () if section[:1] == ("data",) else (".formulas.",)
    every = [key for key in keys.dotted_keys() if not any(part in key for part in hidden)]
    if section[:1] == ("reinforce",):
        return every
    others = {key.rpartition(".")[2] for key in every if not key.startswith("reinforce.")}
    return [
        key
        for key in every
        if not key.startswith("reinforce.") or key.rpartition(".")[2] not in others
    ]


def _instruction(known: ForeignName, section: keys.Path, value: object) -> str:
    """The fix for another tool's key in `section`."""
    if known.none is not None:
        return f"remove it: {known.none}"
    if known.set is not None:
        if not value:  # `use_cpu: false` changes nothing
            return "remove it: nothing needs to be turned off"
        because = f", {known.because}" if known.because else ""
        return known.text or f"write {known.set}{because}"
    assert known.key is not None, "an entry has key, set or none"
    instruction = _move(section, [known.key])
    return f"{instruction}, {known.note}" if known.note else instruction


def quoted(value: object) -> str:
    """A value as it is written in a spec, on one line."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return json.dumps(value, default=str)


def _move(section: keys.Path, targets: list[str]) -> str:
    parent = ".".join(part for part in section if isinstance(part, str))
    for target in targets:
        above, _, leaf = target.rpartition(".")
        if parent in (above, *(above.replace("data.train", other) for other in _HELD_OUT)):
            return f"write {leaf}"
    here = ".".join(map(str, section[:2]))
    unlikely = {"data.train", *_HELD_OUT} - {here} if here in _HELD_OUT else {*_HELD_OUT}
    if len(targets) > 1:
        prefixes = tuple(f"{source}." for source in unlikely)
        targets = [t for t in targets if not t.startswith(prefixes)] or targets
    return f"move it to {' or '.join(targets)}"


def _normalized(name: str) -> str:
    return re.sub(r"[-_\s]", "", name.lower())
