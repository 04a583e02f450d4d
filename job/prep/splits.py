"""Which rows train and which are held out, where the spec names no evaluation source."""

import hashlib


def held_out(group: str, *, fraction: float, seed: int) -> bool:
    """Whether the rows of this group (`Compared.group`) belong to the evaluation split.

    By their content and not by their number: the split stays put when rows are appended, and
    duplicates fall on one side.
    """
    place = hashlib.blake2b(
        f"{seed}:{group}".encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    return int.from_bytes(place, "big") < fraction * 2**64
