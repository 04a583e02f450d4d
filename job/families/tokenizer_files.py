"""A checkpoint's tokenizer files: its control tokens, read without torch or Transformers, and what
is written of a tokenizer.

Prep rejects texts that contain control tokens.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

CONFIG = "tokenizer_config.json"
LOADING = ("is_local", "local_files_only")
"""Keys that Transformers writes to a tokenizer's configuration, about how a process loaded it."""
_CONFIG_FILES = (CONFIG, "special_tokens_map.json")
_LIST_KEYS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")


def control_tokens(directory: Path) -> frozenset[str]:
    """The tokens that the checkpoint's files name or flag as special.

    Raises InputError if one of the files is not JSON.
    """
    tokens = set(_flagged(read_json(directory, "tokenizer.json").get("added_tokens", [])))
    for name in _CONFIG_FILES:
        config = read_json(directory, name)
        decoder = config.get("added_tokens_decoder", {})
        tokens |= set(_flagged(list(decoder.values()) if isinstance(decoder, dict) else []))
        tokens |= set(_named(config))
    return frozenset(tokens - {""})


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the checkpoint; empty if there is no such file."""
    path = directory / name
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(str(path), f"is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def save(processor: "ProcessorMixin | PreTrainedTokenizerBase", directory: Path) -> None:
    """Writes a processor, or a tokenizer alone, for Transformers' `from_pretrained`."""
    processor.save_pretrained(directory)
    path = directory / CONFIG
    config = {k: v for k, v in read_json(directory, CONFIG).items() if k not in LOADING}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def token_text(token: object) -> str | None:
    """A token's text: a token is a string, or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _flagged(added: object) -> Iterator[str]:
    """Added tokens flagged as special, without digits and words, which some converters flag too."""
    for token in added if isinstance(added, list) else []:
        text = token_text(token)
        if text and token.get("special") and not text.isalnum():
            yield text


def _named(config: dict[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        values = [value] if key.endswith("_token") else []
        if key in _LIST_KEYS:
            values = list(value.values()) if isinstance(value, dict) else value
        for token in values if isinstance(values, list) else []:
            if text := token_text(token):
                yield text
