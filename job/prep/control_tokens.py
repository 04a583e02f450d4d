"""Finds control tokens of the model in texts, which the model would act on."""

import re
from collections.abc import Collection, Sequence

from job.prep.rows import Message

FOUND = "the text contains a control token of the model"
FIX = "remove it from the text; images are passed as images, not as tokens"
_NEVER = "(?!)"
"""A pattern that matches nothing."""


def pattern(tokens: Collection[str]) -> "re.Pattern[str]":
    """Matches any of the tokens."""
    # Longest first, as a regular expression takes the first alternative that matches.
    ordered = sorted({*tokens} - {""}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)) or _NEVER)


def find(messages: Sequence[Message], tokens: "re.Pattern[str]") -> str | None:
    """The first control token in the messages, if any."""
    for message in messages:
        for text in (message.text, message.reasoning or ""):
            if (match := tokens.search(text)) is not None:
                return match[0]
    return None
