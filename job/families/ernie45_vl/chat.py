"""Conversations as ERNIE-4.5-VL writes them, in segments of what is asked and what is answered.

An answer is trained from its first token to its end token, after an empty thinking block, which
is where `enable_thinking: false` starts to generate. The segments are tokenized apart: at
inference the prompt is tokenized without the answer too, so training sees the same tokens, and
the response mask is right by construction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from job.errors import InputError
from job.prep.records import Message

EMPTY_THOUGHT = "\n"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of the rendered conversation; `answer` is what the model is trained to write."""

    text: str
    answer: bool


def segments(template: Any, messages: Sequence[Message]) -> tuple[Segment, ...]:
    """The conversation cut before and after each answer.

    `template` renders messages: `template(messages, add_generation_prompt: bool) -> str`.
    Raises InputError where the checkpoint's template renders an answer that does not begin with
    the prompt it is generated after.
    """
    found: list[Segment] = []
    done = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = template(_turns(messages[:index]), add_generation_prompt=True)
        whole = template(_turns(messages[: index + 1]), add_generation_prompt=False)
        if not (whole.startswith(prompt) and prompt.startswith(done)):
            raise InputError(
                "$.model.model_name_or_path",
                "the checkpoint's chat template does not render an answer after its own "
                "generation prompt, so its tokens cannot be told from the question's",
                value=f"prompt ends {prompt[-60:]!r}, the conversation there {whole[-90:]!r}",
                fix="use a checkpoint whose template ends the generation prompt with an empty "
                "thinking block when enable_thinking is false",
            )
        found.append(Segment(text=prompt[len(done) :], answer=False))
        found.append(Segment(text=whole[len(prompt) :], answer=True))
        done = whole
    return tuple(found)


def prompt(template: Any, messages: Sequence[Message]) -> str:
    """The conversation up to where the model begins to answer."""
    return str(template(_turns(messages), add_generation_prompt=True))


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text} if part.image is None else {"type": "image"}
                for part in message.parts
            ],
        }
        | ({"reasoning_content": EMPTY_THOUGHT} if message.role == "assistant" else {})
        for message in messages
    ]
