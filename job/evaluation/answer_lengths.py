"""The limit on answer length, `eval.generation.max_new_tokens`, and the labels that exceed it."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from job.spec.types import GenerationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADROOM, EXTRA_TOKENS = 0.25, 16
"""`auto` adds this fraction of the longest label, and this number of tokens, to its length."""
THINKING_TOKENS = 2048
"""`auto` adds this many tokens if thinking is enabled."""
MAX_AUTO = 32_768
DEFAULT = 1024
"""The value of `auto` without labels."""


def tokens(tokenizer: "PreTrainedTokenizerBase", answers: Iterable[str]) -> list[int]:
    """The length of each answer in tokens, without the end token."""
    return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers]


def limit(generation: GenerationSpec, labels: Sequence[int]) -> int:
    """The value of max_new_tokens, given the labels' lengths in tokens."""
    if generation.max_new_tokens != "auto":
        return generation.max_new_tokens
    if not labels:
        return DEFAULT
    longest = max(labels)
    answer = longest + int(HEADROOM * longest) + EXTRA_TOKENS
    return min(MAX_AUTO, answer + THINKING_TOKENS * generation.enable_thinking)


def too_long(labels: Sequence[int], limit: int) -> int:
    """The number of labels longer than the limit, for which no answer can be right."""
    return sum(length > limit for length in labels)
