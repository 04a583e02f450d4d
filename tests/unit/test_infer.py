"""The answer of `job infer` as it is written."""

import torch

from job.infer import Stream


def streamed(pieces: list[bytes]) -> list[str]:
    """What is written of tokens that stand for these bytes, and when."""
    written: list[str] = []
    decode = lambda tokens: b"".join(pieces[t] for t in tokens).decode(errors="replace")  # noqa: E731
    stream = Stream(decode, written.append)
    stream.put(torch.tensor([[7, 8, 9]]))  # the prompt
    for token in range(len(pieces)):
        stream.put(torch.tensor([token]))
    stream.end()
    return written


def test_each_token_is_written_as_it_comes_and_the_prompt_never() -> None:
    assert streamed([b"x", b"^", b"{2}"]) == ["x", "^", "{2}", ""]


def test_space_is_written_only_between_words() -> None:
    assert "".join(streamed([b"\n", b"a", b" ", b"b", b" \n"])) == "a b"


def test_half_a_character_waits_for_the_other_half() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert streamed([b"a", first, second]) == ["a", "", "é", ""]


def test_a_half_that_stays_one_is_written_at_the_end() -> None:
    assert "".join(streamed([b"a", b"\xc3"])) == "a\ufffd"
