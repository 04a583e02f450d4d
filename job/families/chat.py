"""Conversations as a checkpoint's own chat template writes them, cut before and after each answer.

An answer is trained from where generation begins to write it to its end token. Families tokenize
piece by piece: at inference the prompt is tokenized without the answer too, so training sees the
same tokens, and the response mask is right by construction.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from job.errors import DataError
from job.prep import control_tokens as marks
from job.prep.rows import EncodedImage, Message, Part

Turns = list[dict[str, Any]]

# What stands around answers in a second rendering: it survives what templates trim, and says where
# answers lie whatever the template makes of them.
_BEGIN, _END = "[[answer>>", "<<answer]]"

PROBE = tuple(Message(role=role, parts=(Part(text="a"),)) for role in ("user", "assistant"))
"""The shortest conversation there is, to see what a template puts around an answer."""


class Template(Protocol):
    def __call__(self, turns: Turns, *, add_generation_prompt: bool) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of the rendered conversation; `answer` is what the model is trained to write."""

    text: str
    answer: bool
    """Whether its tokens are trained."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """The control tokens of a tokenizer: what may end an answer, and what no text may hold."""

    anywhere: "re.Pattern[str]"
    ending: "re.Pattern[str]"
    """With the white space that a template puts before it."""

    @classmethod
    def of(cls, tokenizer: Any) -> "Control":
        added = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and not token.content.isalnum()  # some converters mark digits
        ]
        anywhere = marks.pattern({*tokenizer.all_special_tokens, *added})
        return cls(anywhere=anywhere, ending=re.compile(rf"\s*(?:{anywhere.pattern})"))

    def refuse(self, row_id: str, messages: Sequence[Message]) -> None:
        """Raises DataError if a text holds one. Prep rejects such rows; this is for questions that
        come to `infer`, and for tokens that only the loaded tokenizer knows.
        """
        if (found := marks.find(messages, self.anywhere)) is not None:
            raise DataError(row_id, marks.FOUND, value=found, fix=marks.FIX)


def turns(messages: Sequence[Message], *, as_text: bool = False, **of_answers: Any) -> Turns:
    """The messages as templates take them: content in parts, or as one text.

    `of_answers` is what each of the assistant's turns has besides.
    """
    return [
        {
            "role": message.role,
            "content": message.text if as_text else [_part(part) for part in message.parts],
        }
        | (of_answers if message.role == "assistant" else {})
        for message in messages
    ]


def prompt(row_id: str, template: Template, asked: Turns) -> str:
    """The conversation up to where the model begins to answer."""
    return _render(row_id, template, asked, add_generation_prompt=True)


def segments(
    row_id: str,
    template: Template,
    said: Turns,
    control: Control,
    messages: Sequence[Message] = (),
) -> tuple[Segment, ...]:
    """The conversation in pieces, what is asked and what is answered in turn.

    An answer of `messages`, which `said` was made of, that is not to be trained is a piece of its
    own too, so that its tokens are the same.

    An answer begins where the prompt for it ends: what white space the template puts there is the
    model's to write. Where a template writes earlier answers in another way than it asks for them
    (without a thinking block, say), such an answer begins with its own text.

    Raises DataError where the template refuses the conversation, changes an answer, does not
    render the last one after its own generation prompt, or ends one without a control token.
    """
    whole = _render(row_id, template, said)
    found: list[Segment] = []
    done = 0
    places = [index for index, turn in enumerate(said) if turn["role"] == "assistant"]
    spans = _spans(whole, _render(row_id, template, _marked(said)))
    if spans is None or len(spans) != len(places):
        _fail(row_id, "does not write every answer as it is given", whole)
    for index, (start, end) in zip(places, spans, strict=True):
        asked = prompt(row_id, template, said[:index])
        cut = len(asked)
        if whole.startswith(asked) and cut <= end and not whole[cut:start].strip():
            start = cut
        elif index == places[-1]:
            _fail(row_id, "does not write an answer after its own generation prompt", asked)
        last = control.ending.match(whole, end)
        if last is None:
            _fail(row_id, "ends an answer without a control token to stop at", whole[end:])
        found.append(Segment(text=whole[done:start], answer=False))
        trained = messages[index].train if messages else True
        found.append(Segment(text=whole[start : last.end()], answer=trained))
        done = last.end()
    return tuple(found)


def in_order(
    messages: Sequence[Message], images: Sequence[EncodedImage]
) -> tuple[EncodedImage, ...]:
    """The images in the order in which the conversation mentions them."""
    return tuple(
        images[part.image]
        for message in messages
        for part in message.parts
        if part.image is not None
    )


def _part(part: Part) -> dict[str, Any]:
    return {"type": "text", "text": part.text} if part.image is None else {"type": "image"}


def _marked(said: Turns) -> Turns:
    """The same with marks around every answer."""
    return [
        {**turn, "content": _between_marks(turn["content"])}
        if turn["role"] == "assistant"
        else turn
        for turn in said
    ]


def _between_marks(content: Any) -> Any:
    if isinstance(content, str):
        return f"{_BEGIN}{content}{_END}"
    return [{"type": "text", "text": _BEGIN}, *content, {"type": "text", "text": _END}]


def _spans(whole: str, marked: str) -> list[tuple[int, int]] | None:
    """Where each answer lies in `whole`, by a rendering with marks around them.

    None where the two differ in more than the marks and the white space that a template trims.
    """
    first, *rest = marked.split(_BEGIN)
    if not whole.startswith(first):
        return None
    found, at = [], len(first)
    for number, piece in enumerate(rest, start=1):
        written, mark, after = piece.partition(_END)
        last = number == len(rest)
        for kept in _trimmed(written):
            end = at + len(kept) + len(after)
            if mark and whole.startswith(kept + after, at) and not (last and end != len(whole)):
                found.append((at, at + len(kept)))
                at = end
                break
        else:
            return None
    return found


def _trimmed(text: str) -> list[str]:
    """The text, and what templates leave of it."""
    left = [text, text.lstrip("\n"), text.lstrip()]
    return [kept for one in left for kept in (one, one.rstrip("\n"), one.rstrip())]


def _render(
    row_id: str, template: Template, said: Turns, *, add_generation_prompt: bool = False
) -> str:
    from jinja2 import TemplateError

    try:
        return template(said, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError) as error:
        raise DataError(
            row_id,
            f"the checkpoint's chat template refuses the conversation: {error}",
            fix="give the turns as the model knows them: user and assistant in turn, system first",
        ) from error


def _fail(row_id: str, what: str, shown: str) -> NoReturn:
    raise DataError(
        row_id,
        f"the checkpoint's chat template {what}, so its tokens cannot be told from the question's",
        value=f"…{shown[-90:]!r}",
        fix="remove control text such as <think> from the answer, or use a checkpoint whose "
        "template ends the prompt with an empty thinking block when enable_thinking is false",
    )
