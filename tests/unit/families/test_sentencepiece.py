"""Sentencepiece models become fast tokenizers, token for token."""

from pathlib import Path

import pytest

from job.families.ernie45_vl.published_format.sentencepiece import convert, read_pieces
from tests.published import train_sentencepiece

PICTURE = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("model") / "tokenizer.model", "bpe")


@pytest.mark.parametrize(
    "text",
    [
        "the formula alpha",
        "  two  spaces\n\nnew\tline ",
        f"<|begin_of_sentence|>User: Picture 1:{PICTURE}Write",
        "\\frac{a}{b^{1234}} = 写出公式 é ☃",
        "Assistant: <think>\n\n</think>\n\nx_0",
        "",
    ],
)
def test_tokens_equal_those_of_sentencepiece(model: Path, text: str) -> None:
    from sentencepiece import SentencePieceProcessor

    published = SentencePieceProcessor(model_file=str(model))
    fast = convert(model)
    tokens = fast.encode(text, add_special_tokens=False).ids
    assert tokens == published.encode(text)
    assert fast.decode(tokens, skip_special_tokens=False) == text


def test_ids_are_those_of_the_model(model: Path) -> None:
    fast = convert(model)
    pieces = read_pieces(model.read_bytes())
    assert [fast.token_to_id(piece.text) for piece in pieces] == list(range(len(pieces)))
    assert fast.get_vocab_size() == len(pieces)


@pytest.mark.parametrize("broken", [b"", b"\xff\xff\xff", b"\x0a\x7fshort", b"no model at all"])
def test_what_is_no_model_is_refused(broken: bytes) -> None:
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        read_pieces(broken)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    unigram = train_sentencepiece(tmp_path / "tokenizer.model", "unigram")
    with pytest.raises(ValueError, match="not a sentencepiece model of type BPE"):
        convert(unigram)
