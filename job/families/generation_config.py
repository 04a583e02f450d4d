"""A checkpoint's `generation_config.json`: reads, repairs and writes it."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import InputError
from job.families.base import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FILE = "generation_config.json"
_NAMED = re.compile(r"^- `(\w+)`", re.MULTILINE)
"""Settings without effect, as Transformers' error lists them."""


def read(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings; empty if there are none. Raises InputError if they are not an object."""
    path = checkpoint.directory / FILE
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _error(checkpoint.uri, f"is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise _error(checkpoint.uri, "is not a JSON object")
    return settings


def defaults(config: "PreTrainedConfig") -> dict[str, Any]:
    """Transformers' own settings for a checkpoint that has none."""
    from transformers import GenerationConfig

    settings: dict[str, Any] = GenerationConfig.from_model_config(config).to_diff_dict()
    return settings


def write(
    uri: str, settings: dict[str, Any], end_tokens: tuple[int, ...], directory: Path
) -> tuple[str, ...]:
    """Writes the settings, with `end_tokens` for servers to stop at; returns what was repaired.

    Raises InputError if Transformers rejects them.
    """
    valid, dropped = _repaired(uri, settings)
    written = {**valid, "eos_token_id": list(end_tokens)}
    text = json.dumps(written, indent=2, sort_keys=True)
    (directory / FILE).write_text(text + "\n", encoding="utf-8")
    if not dropped:
        return ()
    named = ", ".join(f"{key} ({settings[key]})" for key in dropped)
    return (
        f"{FILE} is written without {named}: it contradicts the base's other settings, "
        "and Transformers refuses to save both",
    )


def _repaired(uri: str, settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings, and the keys dropped because others leave them without effect.

    Transformers reads those with a warning and refuses to write them: sampling values beside
    `do_sample: false`, for example.
    """
    from transformers import GenerationConfig

    valid, dropped = dict(settings), list[str]()
    while True:
        try:
            GenerationConfig(**valid).validate(strict=True)
        except (ValueError, TypeError) as error:
            without_effect = [key for key in _NAMED.findall(str(error)) if key in valid]
            if not without_effect:
                reason = " ".join(str(error).split())
                raise _error(uri, f"is rejected by Transformers: {reason}") from error
            for key in without_effect:
                del valid[key]
            dropped += without_effect
        else:
            return valid, dropped


def _error(uri: str, why: str) -> InputError:
    return InputError(
        uri, f"its {FILE} {why}", fix=f"correct or remove {FILE} in the checkpoint's folder"
    )
