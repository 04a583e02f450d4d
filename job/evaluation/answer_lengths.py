"""The limit on answer lengths, `eval.generation.max_new_tokens`, and the labels that exceed it."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from job.spec.types import GenerationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADROOM, EXTRA_TOKENS = 0.25, 16
"""What `auto` adds to the longest label: a fraction of it, and a number of tokens."""
THINKING_TOKENS = 2048
"""What `auto` adds for a model that thinks before it answers."""
MAX_AUTO = 32_768
DEFAULT = 1024
"""What `auto` is without labels."""


def tokens(tokenizer: "PreTrainedTokenizerBase", answers: Iterable[str]) -> list[int]:
    """The length of each answer in tokens, without the end token."""
    return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers]


def limit(generation: GenerationSpec, labels: Sequence[int]) -> int:
    """max_new_tokens, given the labels' lengths in tokens."""
    if generation.max_new_tokens != "auto":
        return generation.max_new_tokens
    if not labels:
        return DEFAULT
    longest = max(labels)
    answer = longest + int(HEADROOM * longest) + EXTRA_TOKENS
    return min(MAX_AUTO, answer + THINKING_TOKENS * generation.enable_thinking)


def too_long(labels: Sequence[int], limit: int) -> int:
    """How many labels are longer than the limit: no answer to them can be right."""
    return sum(length > limit for length in labels)
