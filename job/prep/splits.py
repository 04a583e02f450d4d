"""Which rows train and which are held out, where the spec names no evaluation source."""

import hashlib

from job.prep.leakage import LabelKey
from job.prep.records import Row


def split_key(row: Row, label_key: LabelKey) -> str:
    """What decides the row's side: rows that say the same, in normal form, have the same key."""
    said = [message.text for message in row.messages[:-1]] + [label_key(row.answer)]
    return "\0".join(said)


def held_out(key: str, *, fraction: float, seed: int) -> bool:
    """Whether the row with this `split_key` belongs to the evaluation split.

    By its content and not by its number: the split stays put when rows are appended, and
    duplicates fall on one side.
    """
    place = hashlib.blake2b(
        f"{seed}:{key}".encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    return int.from_bytes(place, "big") < fraction * 2**64
