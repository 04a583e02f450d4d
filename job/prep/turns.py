"""Parses the turns of a record of any shape: role, content, and whether each is trained."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from job.prep.columns import Columns, ReadOptions
from job.prep.rows import Role, RowRefused
from job.prep.turn_parts import (
    IMAGE_PLACEHOLDER,
    PART_KEYS,
    ImageSlot,
    content_of,
    parts_of,
    text_of,
)
from job.prep.values import is_absent

ROLES: dict[object, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
GIVEN_SYSTEM = "data.system"
"""The location of a system prompt that is the spec's, not the row's."""
_TRAIN_FLAGS = ("train", "loss", "weight")
_REASONING = "reasoning_content"
"""The key of an answer's thoughts, as chat templates read it."""
_OTHER_REASONING = ("reasoning", "thinking", "thought")
_BLOCK = re.compile(r"</?think(?:ing)?>")
_INLINE = re.compile(r"</?think>")
"""Around thoughts that stand in the answer itself: the template closes its own block before it."""
_TURN_KEYS = ("role", "from", "content", "value", _REASONING, *_TRAIN_FLAGS)
_UNSUPPORTED_KEYS = (
    *("tool_calls", "tool_call_id", "function_call", "tools"),
    *("reasoning_details", "refusal"),
    *("image", "images", "image_url", "video", "videos", "audio"),
)
"""Keys that must not be ignored, because they change the meaning of a turn."""


@dataclass(kw_only=True)
class Turn:
    role: Role
    location: str
    """Its path in the record, for error messages."""
    parts: list[str | ImageSlot]
    train: bool = True
    """Whether the turn is trained, if it is an answer."""
    reasoning: str | None = None
    """The thoughts before it, if it is an answer that has any."""
    ignored: list[str] = field(default_factory=list)
    """Ignored keys of the turn and its parts."""

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


def turns_of(record: Mapping[str, object], columns: Columns, options: ReadOptions) -> list[Turn]:
    """The turns of the record's conversation, the system prompt first.

    Raises RowRefused if there are none, or none that is trained.
    """
    if columns.messages is not None:
        turns = _conversation(record[columns.messages], columns.messages)
        if columns.history is not None and not is_absent(record["history"]):
            raise RowRefused(
                f"has both `history` and `{columns.messages}`: move the turns of `history` to "
                f"`{columns.messages}`"
            )
    else:
        turns = [*_history(record, columns), *_question_and_answer(record, columns, options)]
    turns = _with_system(turns, record, columns, options)
    if turns[-1].role != "assistant":
        raise RowRefused("the last message must be the assistant's")
    for turn in turns:
        _check(turn, last=turn is turns[-1])
    if options.train_on == "last":
        for turn in turns[:-1]:
            turn.train = False
    if not any(turn.train for turn in turns if turn.role == "assistant"):
        raise RowRefused("no answer is trained: flags exclude them all")
    return turns


def _check(turn: Turn, *, last: bool) -> None:
    empty = not turn.text.strip()
    has_image = any(isinstance(part, ImageSlot) for part in turn.parts)
    if turn.role == "assistant":
        if has_image:
            raise RowRefused(f"{turn.location} has an image, but answers must be text only")
        if empty:
            raise RowRefused("the answer is empty" if last else f"answer {turn.location} is empty")
        if (mark := _INLINE.search(turn.text)) is not None:
            raise RowRefused(
                f"{turn.location} contains {mark[0]}: move the thoughts, without it, to "
                f"`{_REASONING}` of the assistant's turn in `messages`"
            )
    elif turn.role == "user" and empty and not has_image:
        raise RowRefused(f"{turn.location} is empty")
    if turn.role != "user" and IMAGE_PLACEHOLDER in turn.text:
        raise RowRefused(
            f"{turn.location} contains {IMAGE_PLACEHOLDER}, which is allowed in questions only"
        )


def _conversation(value: object, column: str) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise RowRefused(f"`{column}` must be a list with at least one message")
    return [_turn(message, f"messages[{number}]") for number, message in enumerate(value)]


def _turn(message: object, location: str) -> Turn:
    name = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or not isinstance(name, str) or name not in ROLES:
        found = f", found {name}" if isinstance(name, str) else ""
        raise RowRefused(f"{location} must have a role of system, user or assistant{found}")
    role = ROLES[name]
    for key in _UNSUPPORTED_KEYS:
        if not is_absent(message.get(key)):
            raise RowRefused(f"{location} has `{key}`, which is not supported: it is not trained")
    for key in _OTHER_REASONING:
        if not is_absent(message.get(key)):
            raise RowRefused(f"{location} has `{key}`: rename it to `{_REASONING}` to train it")
    return Turn(
        role=role,
        location=location,
        parts=parts_of(content_of(message), location, placeholders=role == "user"),
        train=_is_trained(message, role, location),
        reasoning=_reasoning_of(message, role, location),
        ignored=_ignored_keys(message),
    )


def _reasoning_of(message: Mapping[object, object], role: Role, location: str) -> str | None:
    """The thoughts before an answer; None if they are blank: the thinking block is then empty."""
    value = message.get(_REASONING)
    if is_absent(value):
        return None
    text = text_of(value, f"{location}.{_REASONING}")
    if not text.strip():
        return None
    if role != "assistant":
        raise RowRefused(f"{location} has `{_REASONING}`, but only answers have thoughts")
    if (mark := _BLOCK.search(text)) is not None:
        raise RowRefused(
            f"{location}.{_REASONING} contains {mark[0]}, which the chat template writes around it"
        )
    return text


def _ignored_keys(message: Mapping[object, object]) -> list[str]:
    """The keys of a turn and its parts that have a value and are ignored."""
    keys = [
        f"messages[].{k}" for k, v in message.items() if k not in _TURN_KEYS and not is_absent(v)
    ]
    content = content_of(message)
    for part in content if isinstance(content, list) else [content]:
        for key, value in part.items() if isinstance(part, Mapping) else ():
            if key not in PART_KEYS and not is_absent(value):
                keys.append(f"messages[].content[].{key}")
    return keys


def _is_trained(message: Mapping[object, object], role: Role, location: str) -> bool:
    """Reads a turn's own flags: Axolotl's `train`, `loss`, and OpenAI's `weight`."""
    flags = {key: message[key] for key in _TRAIN_FLAGS if message.get(key) is not None}
    for key, value in flags.items():
        if value not in (0, 1):  # includes True and False
            raise RowRefused(f"{location} has {key}: {value}, which must be true, false, 1 or 0")
        if role != "assistant" and value and key != "weight":
            raise RowRefused(f"{location} has {key}: {value}, but only answers are trained")
    if len({bool(value) for value in flags.values()}) > 1:
        raise RowRefused(f"{location} has {' and '.join(flags)}, which contradict each other")
    return all(flags.values())


def _question_and_answer(
    record: Mapping[str, object], columns: Columns, options: ReadOptions
) -> list[Turn]:
    """A question and its answer; without a question, the spec's instruction about the image."""
    spec = options.columns
    for name, column in ((spec.text, columns.text), (spec.question, columns.question)):
        if name is not None and column is None:
            raise RowRefused(f"`{name}` is missing")
    if columns.text is None:
        raise RowRefused("has neither messages nor an answer in a column of a known name")
    question, location = "", "the question"
    if columns.question is not None and not is_absent(record[columns.question]):
        location = f"`{columns.question}`"
        question = text_of(record[columns.question], location)
        if columns.input is not None and not is_absent(record[columns.input]):
            question += "\n" + text_of(record[columns.input], f"`{columns.input}`")
    elif columns.image is None and spec.image is not None:
        raise RowRefused(f"`{spec.image}` is missing, and there is no question")
    elif columns.image is None:
        raise RowRefused("has neither an image nor a question")
    elif is_absent(record[columns.image]):
        raise RowRefused(f"`{columns.image}` is empty")
    elif options.instruction is None:
        raise RowRefused("has no question: set data.instruction to what to ask about the image")
    else:
        question, location = options.instruction, "data.instruction"
    answer = text_of(record[columns.text], f"`{columns.text}`")
    parts = parts_of(question, location, placeholders=True)
    return [
        Turn(role="user", location=location, parts=parts),
        Turn(role="assistant", location=f"`{columns.text}`", parts=[answer]),
    ]


def _history(record: Mapping[str, object], columns: Columns) -> list[Turn]:
    """The turns before the question: [question, answer] pairs, or messages."""
    history = record["history"] if columns.history is not None else None
    if is_absent(history):
        return []
    refused = RowRefused("`history` must be a list of [question, answer] pairs")
    if not isinstance(history, list):
        raise refused
    if all(isinstance(each, Mapping) for each in history):
        return [_turn(message, f"history[{number}]") for number, message in enumerate(history)]
    turns = []
    roles: Sequence[Role] = ("user", "assistant")
    for number, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != len(roles):
            raise refused
        for role, text in zip(roles, pair, strict=True):
            location = f"history[{number}]"
            parts = parts_of(text_of(text, location), location, placeholders=role == "user")
            turns.append(Turn(role=role, location=location, parts=parts))
    return turns


def _with_system(
    turns: list[Turn], record: Mapping[str, object], columns: Columns, options: ReadOptions
) -> list[Turn]:
    """The turns after the row's system prompt, or the spec's if the row has none."""
    value = record[columns.system] if columns.system is not None else None
    own = None if is_absent(value) else text_of(value, f"`{columns.system}`")
    turn = next((turn for turn in turns if turn.role == "system"), None)
    if turn is not None:
        if own is not None and own.strip() != turn.text.strip():
            raise RowRefused(f"has two system prompts, `{columns.system}` and {turn.location}")
        return turns
    system = own or options.system
    if system is None:
        return turns
    location = f"`{columns.system}`" if own else GIVEN_SYSTEM
    return [Turn(role="system", location=location, parts=[system]), *turns]
