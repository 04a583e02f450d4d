"""Keeps the special tokens of a model and its tokenizer, which TRL and Transformers set on both.

The tokenizer is written beside the weights, so its padding token would be published.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def padded(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The tokenizer, or a copy if it has no padding token, for TRL to give it one."""
    return tokenizer if tokenizer.pad_token is not None else copy.deepcopy(tokenizer)


@contextmanager
def special_tokens_kept(model: "PreTrainedModel") -> Iterator[None]:
    """A context after which the model's configurations have the special tokens from before."""
    configs = (model.config, model.config.get_text_config(), model.generation_config)
    own = [{key: vars(config)[key] for key in KEYS if key in vars(config)} for config in configs]
    try:
        yield
    finally:
        for config, values in zip(configs, own, strict=True):
            for key in KEYS:
                vars(config).pop(key, None)
            vars(config).update(values)
