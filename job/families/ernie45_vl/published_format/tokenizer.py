"""The published tokenizer as a fast one, without its remote code.

Published is a sentencepiece model of byte-pair merges, `tokenizer.model`; a folder that this
project has written holds `tokenizer.json`, which is read as it is.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import InputError
from job.families import tokenizer_files
from job.families.ernie45_vl.published_format.sentencepiece import convert, is_mark, read_whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# By these names the processor of Transformers asks its tokenizer for them.
ROLES = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
# The published special tokens, where tokenizer_config.json does not name others.
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
    """The tokenizer in `directory`, of which `config` is the `tokenizer_config.json`.

    Raises InputError where there is none, or one without the tokens of pictures.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fast, model = directory / "tokenizer.json", directory / "tokenizer.model"
    named = {key: text for key in _DEFAULTS if (text := _text(config.get(key))) is not None}
    if fast.is_file():
        backend = _with_text_as_text(Tokenizer.from_file(str(fast)))
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
            fix="name a checkpoint of ERNIE-4.5-VL, with its own tokenizer",
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_max_length=config.get("model_max_length", 131_072),
        extra_special_tokens=dict(ROLES),
        **{key: token for key, token in named.items() if backend.token_to_id(token) is not None},
    )


def control_tokens(directory: Path) -> frozenset[str]:
    """The marks of the tokenizer in `directory`, of either form, without loading it.

    Raises InputError if it cannot be read.
    """
    model = directory / "tokenizer.model"
    found = {*tokenizer_files.tokens(directory), *ROLES.values()}
    if not (directory / "tokenizer.json").is_file() and model.is_file():
        try:
            found |= {*_DEFAULTS.values(), *filter(is_mark, read_whole(model))}
        except (ValueError, OSError) as error:
            raise InputError(str(model), f"cannot be read: {error}") from error
    return frozenset(found)


def _with_text_as_text(backend: "Tokenizer") -> "Tokenizer":
    """The tokenizer with digits and the like as text, where a conversion made them special."""
    written = json.loads(backend.to_str())
    wrong = [t for t in written["added_tokens"] if t["special"] and not is_mark(t["content"])]
    if not wrong:
        return backend
    for token in wrong:
        token["special"] = False
    return type(backend).from_str(json.dumps(written))


def _text(token: Any) -> str | None:
    """A token's text: `tokenizer_config.json` holds plain strings or mappings."""
    return token.get("content") if isinstance(token, dict) else token
