"""Keeps held-out rows out of training: by the picture's digest and by the label's normal form."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from job.prep.records import Row
from job.prep.shards import Rows, ShardWriter

LabelKey = Callable[[str], str]
"""The normal form of a label: labels that mean the same have the same."""


def drop_leaked(directory: Path, label_key: LabelKey) -> int:
    """Removes from the training shards every row that shows or says what a held-out row does.

    Gives how many were removed. The shards are read once; only digests are kept in memory.
    """
    seen: set[bytes] = set()
    for row in Rows(directory, "eval"):
        seen.update(_keys(row, label_key))
    train = Rows(directory, "train")
    leaked = {i for i, row in enumerate(train) if not seen.isdisjoint(_keys(row, label_key))}
    if not leaked:
        return 0
    cleaned = directory / "cleaned"
    cleaned.mkdir()
    writer = ShardWriter(cleaned, "train")
    for index, row in enumerate(train):
        if index not in leaked:
            writer.write(row)
    writer.close()
    for old in directory.glob("train-*.arrow"):
        old.unlink()
    for new in cleaned.iterdir():
        new.rename(directory / new.name)
    cleaned.rmdir()
    return len(leaked)


def _keys(row: Row, label_key: LabelKey) -> list[bytes]:
    """Digests of a row's pictures and of its label; of the whole conversation without pictures.

    A label counts only beside a picture that is to be read: `yes` answers many questions.
    """
    keys = [_digest(b"image", image.data) for image in row.images]
    if keys:
        keys.append(_digest(b"label", label_key(row.answer).encode("utf-8", "surrogatepass")))
    else:
        said = "\0".join(message.text for message in row.messages)
        keys.append(_digest(b"text", said.encode("utf-8", "surrogatepass")))
    return keys


def _digest(kind: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, key=kind, digest_size=16).digest()
