"""How long answers may become: `eval.generation.max_new_tokens`, and what a small one costs."""

from collections.abc import Iterable, Sequence
from typing import Any

from job.spec.types import GenerationSpec

ROOM, SPARE = 0.25, 16
"""What `auto` gives beyond the longest label: a share of it, and tokens."""
THINKING = 2048
"""Tokens that `auto` adds for a model that thinks before it answers."""
LONGEST = 32_768
UNKNOWN = 1024
"""What `auto` is where there are no labels to go by."""


def tokens(tokenizer: Any, answers: Iterable[str]) -> list[int]:
    """How many tokens each of the answers takes, without the one that ends it."""
    return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers]


def limit(generation: GenerationSpec, labels: Sequence[int]) -> int:
    """The longest answer in tokens, for labels of so many tokens each."""
    if generation.max_new_tokens != "auto":
        return generation.max_new_tokens
    if not labels:
        return UNKNOWN
    longest = max(labels)
    room = longest + int(ROOM * longest) + SPARE
    return min(LONGEST, room + THINKING * generation.enable_thinking)


def too_long(labels: Sequence[int], most: int) -> int:
    """How many labels are longer than any answer may become: no answer to them can be right."""
    return sum(length > most for length in labels)
