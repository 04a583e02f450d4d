"""Loads the published tokenizer as a fast one, without remote code.

Published checkpoints have a sentencepiece BPE model, `tokenizer.model`; checkpoints written by this
project have `tokenizer.json`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import InputError
from job.families import tokenizer_files
from job.families.ernie45_vl.published_format.sentencepiece import (
    convert,
    is_control_token,
    read_whole,
)
from job.families.tokenizer_files import token_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Tokenizer attributes in which Transformers' processor looks these tokens up.
ROLES = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
# The published special tokens, unless tokenizer_config.json names others.
_DEFAULTS = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
    "mask_token": "<mask:1>",
}


def read(uri: str, directory: Path, config: dict[str, Any]) -> "PreTrainedTokenizerFast":
    """The tokenizer in `directory`; `config` is its `tokenizer_config.json`.

    Raises InputError if there is none, or if it lacks the image tokens.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fast, model = directory / "tokenizer.json", directory / "tokenizer.model"
    named = {key: text for key in _DEFAULTS if (text := token_text(config.get(key))) is not None}
    if fast.is_file():
        backend = _without_special_text(Tokenizer.from_file(str(fast)))
    elif model.is_file():
        named = {**_DEFAULTS, **named}
        try:
            backend = convert(model)
        except (ValueError, OSError) as error:
            raise InputError(uri, f"its tokenizer.model cannot be read: {error}") from error
    else:
        raise InputError(uri, "holds neither tokenizer.json nor tokenizer.model")
    missing = [token for token in ROLES.values() if backend.token_to_id(token) is None]
    if missing:
        raise InputError(
            uri,
            f"its tokenizer lacks {', '.join(missing)}",
            fix="use an ERNIE-4.5-VL checkpoint with its own tokenizer",
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_max_length=config.get("model_max_length", 131_072),
        extra_special_tokens=dict(ROLES),
        **{key: token for key, token in named.items() if backend.token_to_id(token) is not None},
    )


def control_tokens(directory: Path) -> frozenset[str]:
    """The control tokens of the tokenizer in `directory`, in either format, without loading it.

    Raises InputError if it cannot be read.
    """
    model = directory / "tokenizer.model"
    tokens = {*tokenizer_files.control_tokens(directory), *ROLES.values()}
    if not (directory / "tokenizer.json").is_file() and model.is_file():
        try:
            tokens |= {*_DEFAULTS.values(), *filter(is_control_token, read_whole(model))}
        except (ValueError, OSError) as error:
            raise InputError(str(model), f"cannot be read: {error}") from error
    return frozenset(tokens)


def _without_special_text(backend: "Tokenizer") -> "Tokenizer":
    """Makes digits and the like ordinary text again, if a converter made them special tokens."""
    settings = json.loads(backend.to_str())
    special = [token for token in settings["added_tokens"] if token["special"]]
    wrong = [token for token in special if not is_control_token(token["content"])]
    if not wrong:
        return backend
    for token in wrong:
        token["special"] = False
    return type(backend).from_str(json.dumps(settings))
