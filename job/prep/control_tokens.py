"""Control tokens of the model, which no text of a row may hold: the model would take them for its
own.
"""

import re
from collections.abc import Collection, Sequence

from job.prep.rows import Message

FOUND = "the text holds a control token of the model"
FIX = "remove it from the text; images are given as images"
NONE = "(?!)"
"""A pattern that fits nowhere."""


def pattern(tokens: Collection[str]) -> "re.Pattern[str]":
    """What fits any of the tokens."""
    # The longest first, for a regular expression takes the first that fits.
    found = sorted({*tokens} - {""}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, found)) or NONE)


def find(messages: Sequence[Message], tokens: "re.Pattern[str]") -> str | None:
    """The first control token in what is said, if any."""
    for message in messages:
        if (found := tokens.search(message.text)) is not None:
            return found[0]
    return None
