"""A sentencepiece model of byte-pair merges as a fast tokenizer, token for token.

Transformers converts one too, but reads the file by protobuf, which the job needs for nothing
else; and it takes digits, which this model keeps as whole pieces, for special tokens.
The file format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _DEFINED = 1, 2, 3, 4  # SentencePiece.Type
_BYTE_PAIRS = 2  # TrainerSpec.ModelType


@dataclass(frozen=True, kw_only=True)
class Piece:
    text: str
    kind: int


def convert(path: Path) -> "Tokenizer":
    """The model at `path` in `tokenizers`.

    Raises ValueError where it is not one of byte-pair merges.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers.tokenization_utils_base import generate_merges

    pieces = read_pieces(path.read_bytes())
    vocabulary = {piece.text: number for number, piece in enumerate(pieces)}
    whole = _whole(pieces)
    mergeable = {p.text for p in pieces if p.kind == _NORMAL}
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=generate_merges(vocabulary, skip_tokens=vocabulary.keys() - mergeable),
            unk_token=next((p.text for p in pieces if p.kind == _UNKNOWN), None),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # No space is put before a text: this model's texts start with a mark.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme="never", split=False
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # Digits and the like are whole pieces too, but text.
    backend.add_tokens(
        [AddedToken(text, normalized=False, special=is_mark(text)) for text in whole]
    )
    return backend


def read_whole(path: Path) -> list[str]:
    """The pieces of the model at `path` that are never merged or split: marks, digits and the like.

    Raises ValueError if it is not a model of byte-pair merges.
    """
    return _whole(read_pieces(path.read_bytes()))


def _whole(pieces: list[Piece]) -> list[str]:
    return [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL, _DEFINED)]


def is_mark(text: str) -> bool:
    """Whether a whole piece is a mark of the model's own, which no text holds."""
    return text.startswith("<") and text.endswith(">")


def read_pieces(model: bytes) -> list[Piece]:
    """The pieces of a serialized `ModelProto`, in the order of their ids.

    Raises ValueError where it is no such thing, or not a model of byte-pair merges.
    """
    pieces: list[Piece] = []
    kind = 0
    for number, value in _fields(model):
        if number == 1 and isinstance(value, bytes):  # pieces
            inner = dict(_fields(value))
            text, piece_kind = inner.get(1), inner.get(3, _NORMAL)
            if not isinstance(text, bytes) or not isinstance(piece_kind, int):
                raise ValueError("not a sentencepiece model")
            pieces.append(Piece(text=text.decode(), kind=piece_kind))
        elif number == 2 and isinstance(value, bytes):  # trainer_spec
            found = dict(_fields(value)).get(3, 1)
            kind = found if isinstance(found, int) else 0
    if kind != _BYTE_PAIRS:
        raise ValueError("not a sentencepiece model of byte-pair merges")
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: numbers decoded, all else as bytes."""
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _number(message, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire, -1)
        if wire == 2:
            size, at = _number(message, at)
        if size < 0 or at + size > len(message):
            raise ValueError("not a sentencepiece model")
        yield key >> 3, message[at : at + size]
        at += size


def _number(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        if at >= len(message):
            raise ValueError("not a sentencepiece model")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
