"""Renders conversations with the chat template, and splits them before and after each answer.

An answer is supervised from where generation would begin, up to and including its end token: with
thoughts, from where generation that thinks would begin. Each
segment is tokenized separately, as in inference, where the prompt is tokenized without the answer:
training sees the same tokens, and the label mask follows from the segments.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from job.errors import DataError
from job.families.chat_template import at_line
from job.prep import control_tokens
from job.prep.rows import EncodedImage, Message, Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = list[dict[str, Any]]
REASONING = "reasoning_content"
"""The key of an answer's thoughts in a turn."""

# Markers around the answers in a second rendering, which locate the answers in the first: templates
# may trim an answer, but not these.
_BEGIN, _END = "[[answer>>", "<<answer]]"

PROBE = tuple(Message(role=role, parts=(Part(text="a"),)) for role in ("user", "assistant"))
"""The shortest conversation, which shows what a template puts around an answer."""


IMAGE_PROBE = (
    Message(role="user", parts=(Part(text="a"), Part(image=0), Part(text="b"), Part(image=1))),
    Message(role="assistant", parts=(Part(text="c"),)),
)
"""A conversation with two images between its texts."""


class Template(Protocol):
    def __call__(self, turns: Turns, *, add_generation_prompt: bool) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of the rendered conversation."""

    text: str
    supervised: bool
    """Whether its tokens have labels: those of answers that are trained."""


@dataclass(frozen=True, kw_only=True)
class ControlTokens:
    """A tokenizer's control tokens: one of them ends every answer, and no text may contain any."""

    pattern: "re.Pattern[str]"
    answer_end: "re.Pattern[str]"
    """A control token, and whitespace before it."""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "ControlTokens":
        added = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and not token.content.isalnum()  # some converters flag digits
        ]
        pattern = control_tokens.pattern({*tokenizer.all_special_tokens, *added})
        return cls(pattern=pattern, answer_end=re.compile(rf"\s*(?:{pattern.pattern})"))

    def reject(self, row_id: str, messages: Sequence[Message]) -> None:
        """Raises DataError if a message contains a control token.

        Prep rejects such rows; this catches prompts of `infer`, and tokens that only the loaded
        tokenizer knows.
        """
        if (token := control_tokens.find(messages, self.pattern)) is not None:
            raise DataError(row_id, control_tokens.FOUND, value=token, fix=control_tokens.FIX)


def turns(messages: Sequence[Message], *, as_text: bool = False, **answer_fields: str) -> Turns:
    """The messages as chat templates take them: content as parts, or as one text.

    `answer_fields` are added to every turn of the assistant; an answer's own thoughts replace
    `reasoning_content`.
    """
    return [
        {
            "role": message.role,
            "content": message.text if as_text else [_part(part) for part in message.parts],
        }
        | (answer_fields if message.role == "assistant" else {})
        | ({} if message.reasoning is None else {REASONING: message.reasoning})
        for message in messages
    ]


def thinking(template: object, *, enabled: bool) -> dict[str, bool]:
    """The template's variable for thinking.

    Empty if it reads none: a processor would mistake the variable for an argument of its own.
    """
    return {"enable_thinking": enabled} if "enable_thinking" in str(template) else {}


def prompt(row_id: str, template: Template, question: Turns) -> str:
    """The rendered conversation with the generation prompt."""
    rendered = _render(row_id, template, question, add_generation_prompt=True)
    _require_shown(row_id, rendered, question)
    return rendered


def segments(
    row_id: str,
    template: Template,
    conversation: Turns,
    control: ControlTokens,
    messages: Sequence[Message] = (),
    *,
    thinking: Template | None = None,
) -> tuple[Segment, ...]:
    """The rendered conversation in alternating segments: questions and answers.

    `conversation` is made from `messages`, which say which answers are supervised, and which have
    thoughts: `thinking` is the template for those. Unsupervised answers are segments too, so that
    their tokens are the same.

    An answer's segment begins where its prompt ends, including whitespace that the template puts
    there, because the model has to generate it. If a template renders earlier answers differently
    from their prompts (without a thinking block, say), their segments begin with the answer's text.

    Raises DataError if the template rejects the conversation, changes an answer, does not render
    the last answer after its own generation prompt or a supervised one's thoughts, or ends an
    answer without a control token.
    """

    def template_of(index: int) -> Template:
        thinks = bool(messages) and messages[index].reasoning is not None
        return thinking if thinks and thinking is not None else template

    answers = [i for i, turn in enumerate(conversation) if turn["role"] == "assistant"]
    render = template_of(answers[-1])
    whole = _render(row_id, render, conversation)
    _require_shown(row_id, whole, conversation)
    spans = _spans(whole, _render(row_id, render, _marked(conversation)))
    if spans is None or len(spans) != len(answers):
        _fail(row_id, "changes an answer", whole)
    cut: list[Segment] = []
    done = 0
    for index, (start, end) in zip(answers, spans, strict=True):
        question = prompt(row_id, template_of(index), conversation[:index])
        length = len(question)
        follows = whole.startswith(question) and length <= end
        thoughts = messages[index].reasoning if messages else None
        trained = messages[index].train if messages else True
        if thoughts is not None:
            if follows and thoughts.strip() in whole[length:start]:
                start = length
            elif trained:
                raise _hidden_thoughts(row_id, index, last=index == answers[-1])
        elif follows and not whole[length:start].strip():
            start = length
        elif index == answers[-1]:
            _fail(row_id, "does not render an answer after its generation prompt", question)
        last = control.answer_end.match(whole, end)
        if last is None:
            _fail(row_id, "ends an answer without a control token to stop at", whole[end:])
        cut.append(Segment(text=whole[done:start], supervised=False))
        cut.append(Segment(text=whole[start : last.end()], supervised=trained))
        done = last.end()
    return tuple(cut)


def require_placeholders(
    row_id: str, rendered: Sequence[Segment], placeholder: str, *, images: int
) -> None:
    """Raises DataError unless the rendered conversation has a placeholder for each image."""
    found = "".join(segment.text for segment in rendered).count(placeholder)
    if found != images:
        raise DataError(
            row_id,
            f"the chat template shows {found} of {images} images",
            fix=f"write {placeholder} once for each part of type image",
        )


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


def _marked(conversation: Turns) -> Turns:
    """The conversation with markers around every answer."""
    return [
        {**turn, "content": _between_marks(turn["content"])}
        if turn["role"] == "assistant"
        else turn
        for turn in conversation
    ]


def _between_marks(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return f"{_BEGIN}{content}{_END}"
    return [{"type": "text", "text": _BEGIN}, *content, {"type": "text", "text": _END}]


def _spans(whole: str, marked: str) -> list[tuple[int, int]] | None:
    """Each answer's start and end in `whole`, found by a rendering with markers around them.

    None if the two differ by more than the markers and trimmed whitespace.
    """
    first, *rest = marked.split(_BEGIN)
    if not whole.startswith(first):
        return None
    spans, position = [], len(first)
    for number, piece in enumerate(rest, start=1):
        written, mark, after = piece.partition(_END)
        last = number == len(rest)
        for answer in _trimmed(written):
            end = position + len(answer) + len(after)
            matches = mark and whole.startswith(answer + after, position)
            if matches and not (last and end != len(whole)):
                spans.append((position, position + len(answer)))
                position = end
                break
        else:
            return None
    return spans


def _trimmed(text: str) -> list[str]:
    """The text as templates may render it: as is, or trimmed in several ways."""
    starts = [text, text.lstrip("\n"), text.lstrip()]
    return [trimmed for start in starts for trimmed in (start, start.rstrip("\n"), start.rstrip())]


def _render(
    row_id: str, template: Template, conversation: Turns, *, add_generation_prompt: bool = False
) -> str:
    from jinja2 import TemplateError

    try:
        return template(conversation, add_generation_prompt=add_generation_prompt)
    except (
        *(TemplateError, TypeError, ValueError),
        *(LookupError, AttributeError, ArithmeticError, RecursionError),
    ) as error:
        raise DataError(
            row_id,
            f"the chat template rejects the conversation: {at_line(error)}",
            fix="alternate user and assistant turns, with the system turn first, or set "
            "model.chat_template to a template for such conversations",
        ) from error


def _require_shown(row_id: str, rendered: str, conversation: Turns) -> None:
    """Raises DataError if the template leaves out a system prompt, or prints parts as Python."""
    for turn in conversation:
        content = turn["content"]
        texts = [content] if isinstance(content, str) else [p.get("text", "") for p in content]
        if turn["role"] == "system" and not all(text.strip() in rendered for text in texts):
            raise DataError(
                row_id,
                "the chat template does not show the system prompt",
                fix="put its text into the question, or set model.chat_template to a template with "
                "a system role",
            )
        if not isinstance(content, str) and str(content) in rendered:
            raise DataError(
                row_id,
                f"the chat template prints the parts of the {turn['role']} turn instead of their "
                "text",
                fix="loop over the parts of message.content, for text and for images",
            )


def _hidden_thoughts(row_id: str, index: int, *, last: bool) -> DataError:
    where = "the last answer" if last else "an earlier answer, which is trained"
    return DataError(
        row_id,
        f"the chat template does not show the thoughts before {where}",
        value=f"messages[{index}].{REASONING}",
        fix=f"remove {REASONING}, or set model.chat_template to a template that shows "
        f"message.{REASONING} after its generation prompt with enable_thinking"
        if last
        else "set data.train_on: last, so that only the last answer is trained, with its thoughts",
    )


def _fail(row_id: str, what: str, shown: str) -> NoReturn:
    raise DataError(
        row_id,
        f"the chat template {what}, so the answer's tokens cannot be located",
        value=f"…{shown[-90:]!r}",
        fix="remove control text such as <think> from the answer, or use a checkpoint or "
        "model.chat_template that ends the prompt with an empty thinking block when "
        "enable_thinking is false",
    )
