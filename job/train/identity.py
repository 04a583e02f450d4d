"""What makes a training the one it is, however long it goes on and however its steps are computed.

Checkpoints keep the parts, so that one of another training can be told with what has changed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from job.redaction import redacted
from job.storage.digests import fingerprint

_SHOWN = 60
"""Characters of a value; longer ones are named without it."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The parts of a training's identity by the names that a user knows them by."""

    parts: Mapping[str, Any]
    """Keys of the spec with their values, and digests of what the spec names."""

    @property
    def fingerprint(self) -> str:
        return fingerprint("checkpoints", dict(self.parts))

    def to_json(self) -> dict[str, Any]:
        """The parts as a checkpoint's manifest stores them: plain JSON, without secrets."""
        parts: dict[str, Any] = json.loads(json.dumps(redacted(dict(self.parts))))
        return parts


def changes(then: object, now: Mapping[str, Any]) -> str:
    """What differs between the parts that a manifest stored and those of this training."""
    if not isinstance(then, dict) or not now:
        return "its manifest does not say what has changed"
    names = [
        name for name in (*now, *(then.keys() - now.keys())) if then.get(name) != now.get(name)
    ]
    return "; ".join(_change(name, then, now) for name in names) or "in a value that is not stored"


def _change(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    before, after = (json.dumps(parts.get(name), ensure_ascii=False) for parts in (then, now))
    if max(len(before), len(after)) > _SHOWN:
        return f"{name} changed"
    return f"{name} was {before} and is {after}"
