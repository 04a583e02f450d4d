"""Converts a sentencepiece BPE model to a fast tokenizer that gives the same tokens.

Transformers has a converter too, but it needs protobuf, which nothing else here does, and it turns
digits, which this model has as user-defined pieces, into special tokens.
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
    """The model at `path` as a tokenizer of `tokenizers`. Raises ValueError if it is not BPE."""
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
    # No space before a text: this model's texts start with a control token.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme="never", split=False
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # User-defined pieces such as digits are not special.
    backend.add_tokens(
        [AddedToken(text, normalized=False, special=is_control_token(text)) for text in whole]
    )
    return backend


def read_whole(path: Path) -> list[str]:
    """The model's pieces that are never merged or split: control tokens, digits and the like.

    Raises ValueError if it is not a sentencepiece BPE model.
    """
    return _whole(read_pieces(path.read_bytes()))


def _whole(pieces: list[Piece]) -> list[str]:
    return [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL, _DEFINED)]


def is_control_token(text: str) -> bool:
    """Whether a whole piece is a control token, not text."""
    return text.startswith("<") and text.endswith(">")


def read_pieces(model: bytes) -> list[Piece]:
    """The pieces of a serialized `ModelProto`, in the order of their ids.

    Raises ValueError if it is not a sentencepiece BPE model.
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
            model_type = dict(_fields(value)).get(3, 1)
            kind = model_type if isinstance(model_type, int) else 0
    if kind != _BYTE_PAIRS:
        raise ValueError("not a sentencepiece model of type BPE")
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: varints decoded, everything else as bytes."""
    offset = 0
    while offset < len(message):
        key, offset = _varint(message, offset)
        wire_type = key & 7
        if wire_type == 0:
            value, offset = _varint(message, offset)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire_type, -1)
        if wire_type == 2:
            size, offset = _varint(message, offset)
        if size < 0 or offset + size > len(message):
            raise ValueError("not a sentencepiece model")
        yield key >> 3, message[offset : offset + size]
        offset += size


def _varint(message: bytes, offset: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the offset after it."""
    value = shift = 0
    while True:
        if offset >= len(message):
            raise ValueError("not a sentencepiece model")
        byte = message[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            return value, offset
