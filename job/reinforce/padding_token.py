"""Keeps the padding token of a model and its tokenizer, which TRL sets on both.

The tokenizer is written beside the weights, so its padding token would be published.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def padded(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """The tokenizer, or a copy if it has no padding token, for TRL to give it one."""
    return tokenizer if tokenizer.pad_token is not None else copy.deepcopy(tokenizer)


@contextmanager
def padding_token_kept(model: "PreTrainedModel") -> Iterator[None]:
    """A context after which the model's configurations have the padding token from before."""
    text, generation = model.config.get_text_config(), model.generation_config
    own = text.pad_token_id, generation.pad_token_id
    try:
        yield
    finally:
        text.pad_token_id, generation.pad_token_id = own
