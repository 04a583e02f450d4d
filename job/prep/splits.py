"""Which rows train and which are held out, where the spec names no evaluation source."""

import hashlib

from job.prep.records import Row


def content_key(row: Row) -> str:
    """A digest of what the row shows and says; equal rows have equal keys."""
    digest = hashlib.blake2b(digest_size=16)
    for image in row.images:
        digest.update(hashlib.sha256(image.data).digest())
    for message in row.messages:
        digest.update(message.role.encode())
        digest.update(message.text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def held_out(key: str, *, fraction: float, seed: int) -> bool:
    """Whether the row with this `content_key` belongs to the evaluation split.

    By its content and not by its number: the split stays put when rows are appended, and
    duplicates fall on one side.
    """
    place = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(place, "big") < fraction * 2**64
