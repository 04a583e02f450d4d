"""A checkpoint's control tokens from its tokenizer's files, without loading the tokenizer.

Prep refuses texts that hold them, and imports neither torch nor Transformers for it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from job.errors import InputError

_NAMED = ("tokenizer_config.json", "special_tokens_map.json")
_LISTED = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")


def tokens(directory: Path) -> frozenset[str]:
    """The tokens that the checkpoint in `directory` names as special, or marks so.

    Raises InputError if a file of them is not JSON.
    """
    found = set(_marked(read_json(directory, "tokenizer.json").get("added_tokens", [])))
    for name in _NAMED:
        config = read_json(directory, name)
        decoder = config.get("added_tokens_decoder", {})
        found |= set(_marked(list(decoder.values()) if isinstance(decoder, dict) else []))
        found |= set(_named(config))
    return frozenset(found - {""})


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The object in a file of the checkpoint; an empty one if there is no such file."""
    path = directory / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(str(path), f"is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _marked(added: Any) -> Iterator[str]:
    """The texts of added tokens that are special; some converters mark digits and words too."""
    for token in added if isinstance(added, list) else []:
        text = _text(token)
        if text and token.get("special") and not text.isalnum():
            yield text


def _named(config: dict[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        values = [value] if key.endswith("_token") else []
        if key in _LISTED:
            values = list(value.values()) if isinstance(value, dict) else value
        for each in values if isinstance(values, list) else []:
            if text := _text(each):
                yield text


def _text(token: Any) -> str | None:
    """A token's text, given as it is or in a mapping."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
