"""A checkpoint's own `generation_config.json`: read, and written as Transformers would write it."""

import json
import re
from pathlib import Path
from typing import Any

from job.errors import InputError
from job.families.base import Checkpoint

FILE = "generation_config.json"
_NAMED = re.compile(r"^- `(\w+)`", re.MULTILINE)


def read(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings; empty if the checkpoint has none. Raises InputError if they are no object."""
    path = checkpoint.directory / FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _refused(checkpoint.uri, f"is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise _refused(checkpoint.uri, "holds no object")
    return found


def write(
    uri: str, settings: dict[str, Any], end_tokens: tuple[int, ...], directory: Path
) -> tuple[str, ...]:
    """Writes the settings with `end_tokens`, where servers stop; returns what was repaired.

    Raises InputError if Transformers would not read them.
    """
    kept, left_out = _repaired(uri, settings)
    written = {**kept, "eos_token_id": list(end_tokens)}
    text = json.dumps(written, indent=2, sort_keys=True)
    (directory / FILE).write_text(text + "\n", encoding="utf-8")
    if not left_out:
        return ()
    named = ", ".join(f"{key} ({settings[key]})" for key in left_out)
    return (
        f"{FILE} is written without {named}: the base's own settings contradict it, "
        "and Transformers refuses to save both",
    )


def _repaired(uri: str, settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings without those that have no effect beside the others, which Transformers reads
    with a warning and refuses to write: sampling values with `do_sample: false`, say.
    """
    from transformers import GenerationConfig

    kept, left_out = dict(settings), list[str]()
    while True:
        try:
            GenerationConfig(**kept).validate(strict=True)
        except (ValueError, TypeError) as error:
            without_effect = [key for key in _NAMED.findall(str(error)) if key in kept]
            if not without_effect:
                reason = " ".join(str(error).split())
                raise _refused(uri, f"is refused by Transformers: {reason}") from error
            for key in without_effect:
                del kept[key]
            left_out += without_effect
        else:
            return kept, left_out


def _refused(uri: str, why: str) -> InputError:
    return InputError(
        uri, f"its {FILE} {why}", fix=f"correct or remove {FILE} in the checkpoint's folder"
    )
