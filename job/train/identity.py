"""The identity of a training: all that determines its weights, except length and batch layout.

Checkpoints store its parts, so that a mismatch can be explained by what has changed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from job.redaction import redacted
from job.storage.digests import fingerprint

_SHOWN = 60
"""Maximum number of characters of a value that is shown."""

_HINTS = {
    "train.rows_a_step": "per_device_train_batch_size × gradient_accumulation_steps × processes; "
    "to resume, keep the product",
    "train.sharded": "as runtime.distributed: fsdp2 does; to resume, leave it as it was",
}
"""What decides parts that are no keys of the spec."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The parts of a training's identity, under user-facing names."""

    parts: Mapping[str, Any]
    """Spec keys with their values, and digests of the files that the spec names."""

    @property
    def fingerprint(self) -> str:
        return fingerprint("checkpoints", dict(self.parts))

    def to_json(self) -> dict[str, Any]:
        """The parts as a checkpoint's manifest stores them: JSON without secrets."""
        parts: dict[str, Any] = json.loads(json.dumps(redacted(dict(self.parts))))
        return parts


def changes(then: object, now: Mapping[str, Any]) -> str:
    """Describes how this training's parts differ from those stored in a manifest."""
    if not isinstance(then, dict) or not now:
        return "its manifest does not say what has changed"
    names = [
        name for name in (*now, *(then.keys() - now.keys())) if then.get(name) != now.get(name)
    ]
    return (
        "; ".join(_change(name, then, now) for name in names)
        or "a value that is not stored changed"
    )


def _change(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    before, after = (json.dumps(parts.get(name), ensure_ascii=False) for parts in (then, now))
    if max(len(before), len(after)) > _SHOWN:
        return f"{name} changed"
    hint = f" ({_HINTS[name]})" if name in _HINTS else ""
    return f"{name} was {before} and is {after}{hint}"
