"""The turns of a record, whichever shape it has: who speaks, what is said, and what trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from job.prep.columns import Columns, Reading
from job.prep.rows import Role
from job.prep.values import is_absent

MAX_TEXT = 100_000
MARK = "<image>"
"""Where a question has an image."""
ROLES: dict[object, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_IMAGES = ("image", "image_url", "url", "path", "bytes", "base64")
_PART = ("type", "text", *_IMAGES)
_FLAGS = ("train", "loss", "weight")
_READ = ("role", "from", "content", "value", *_FLAGS)
_REFUSED = (
    *("tool_calls", "tool_call_id", "function_call", "tools"),
    *("reasoning_content", "reasoning", "thinking", "refusal"),
    *("image", "images", "image_url", "video", "videos", "audio"),
)
"""Keys of a turn that change what it says, and that nothing here reads."""


class RowRefused(ValueError):
    """The record cannot become a row; the text says why, for the list of rejects."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Where a turn has an image: its own `value`, or the next of the row's column."""

    value: object = None


@dataclass(kw_only=True)
class Turn:
    role: Role
    where: str
    """Its place in the record, for messages."""
    parts: list[str | Picture]
    train: bool = True
    """Whether it trains, if it is an answer."""
    unread: list[str] = field(default_factory=list)
    """Its keys that are not read, and those of its parts."""

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


def turns_of(record: Mapping[str, object], columns: Columns, reading: Reading) -> list[Turn]:
    """The turns of the conversation that the record describes, the system's first.

    Raises RowRefused if it describes none, or one that trains nothing.
    """
    if columns.messages is not None:
        turns = _conversation(record[columns.messages], columns.messages)
        if columns.history is not None and not is_absent(record["history"]):
            raise RowRefused(
                f"`history` stands beside `{columns.messages}`: write its turns in there"
            )
    else:
        turns = [*_history(record, columns), *_asked(record, columns, reading)]
    turns = _with_system(turns, record, columns, reading)
    if turns[-1].role != "assistant":
        raise RowRefused("the last message must be the assistant's")
    for turn in turns:
        _check(turn, last=turn is turns[-1])
    if reading.train_on == "last":
        for turn in turns[:-1]:
            turn.train = False
    if not any(turn.train for turn in turns if turn.role == "assistant"):
        raise RowRefused("none of its answers is to be trained")
    return turns


def _check(turn: Turn, *, last: bool) -> None:
    empty = not turn.text.strip()
    images = any(isinstance(part, Picture) for part in turn.parts)
    if turn.role == "assistant":
        if images:
            raise RowRefused(f"{turn.where} has an image in an answer, which is text alone")
        if empty:
            raise RowRefused("the answer is empty" if last else f"the answer {turn.where} is empty")
    elif turn.role == "user" and empty and not images:
        raise RowRefused(f"{turn.where} is empty")
    if turn.role != "user" and MARK in turn.text:
        raise RowRefused(f"{turn.where} has {MARK}, which stands for an image in a question alone")


def _conversation(value: object, column: str) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise RowRefused(f"`{column}` must be a list with at least one message")
    return [_turn(message, f"messages[{number}]") for number, message in enumerate(value)]


def _turn(message: object, where: str) -> Turn:
    said = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or not isinstance(said, str) or said not in ROLES:
        found = f", found {said}" if isinstance(said, str) else ""
        raise RowRefused(f"{where} needs a role of system, user or assistant{found}")
    role = ROLES[said]
    for key in _REFUSED:
        if not is_absent(message.get(key)):
            raise RowRefused(f"{where} has `{key}`, which is not read")
    return Turn(
        role=role,
        where=where,
        parts=parts_of(content_of(message), where, marks=role == "user"),
        train=_trains(message, role, where),
        unread=_unread(message),
    )


def _unread(message: Mapping[object, object]) -> list[str]:
    """The keys with a value of a turn and of its parts that are not read."""
    found = [f"messages[].{k}" for k, v in message.items() if k not in _READ and not is_absent(v)]
    content = content_of(message)
    for part in content if isinstance(content, list) else [content]:
        for key, value in part.items() if isinstance(part, Mapping) else ():
            if key not in _PART and not is_absent(value):
                found.append(f"messages[].content[].{key}")
    return found


def _trains(message: Mapping[object, object], role: Role, where: str) -> bool:
    """What a turn's own flags say: Axolotl's `train`, `loss`, and OpenAI's `weight`."""
    flags = {key: message[key] for key in _FLAGS if message.get(key) is not None}
    for key, value in flags.items():
        if value not in (0, 1):  # True and False are among them
            raise RowRefused(f"{where} has {key}: {value}, which must be true or false, or 1 or 0")
        if role != "assistant" and value and key != "weight":
            raise RowRefused(f"{where} has {key}: {value}, and answers alone are trained")
    if len({bool(value) for value in flags.values()}) > 1:
        raise RowRefused(f"{where} has {' and '.join(flags)}, which contradict each other")
    return all(flags.values())


def content_of(message: Mapping[object, object]) -> object:
    """A turn's content, as `content` or as ShareGPT's `value`."""
    return message.get("content", message.get("value"))


def parts_of(content: object, where: str, *, marks: bool) -> list[str | Picture]:
    """Content as texts and images in order; with `marks`, `<image>` in a text is an image.

    Raises RowRefused for a part that is neither.
    """
    found: list[str | Picture] = []
    for part in content if isinstance(content, list) else [content]:
        made = _part(part, where)
        if isinstance(made, str) and marks and MARK in made:
            found += _marked(made)
        else:
            found.append(made)
    return found


def _part(part: object, where: str) -> str | Picture:
    if not isinstance(part, Mapping):
        return text_of(part, where)
    images = {key: part[key] for key in _IMAGES if not is_absent(part.get(key))}
    text = part.get("text")
    kind = part.get("type") or ("image" if images or text is None else "text")
    if kind in ("image", "image_url"):
        if "bytes" in images:
            images.pop("path", None)  # what the file of these bytes was called
        if len(images) > 1 or not is_absent(text):
            several = [*images, *([] if is_absent(text) else ["text"])]
            raise RowRefused(f"{where} has {' and '.join(several)} in one part")
        value = next(iter(images.values()), None)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        return Picture(value=value)
    if kind != "text":
        raise RowRefused(f"{where} has a part of type {kind}, which is not read")
    if images:
        raise RowRefused(f"{where} has text and {' and '.join(images)} in one part")
    return text_of(text, where)


def _marked(text: str) -> list[str | Picture]:
    """Text with marks as parts: what lies between them, and an image for each."""
    first, *rest = text.split(MARK)
    parts: list[str | Picture] = [first] if first.strip() else []
    for each in rest:
        parts.append(Picture())
        if each.strip():
            parts.append(each.lstrip("\n"))
    return parts


def _asked(record: Mapping[str, object], columns: Columns, reading: Reading) -> list[Turn]:
    """A question and its answer; the question of a pair is the spec's instruction."""
    spec = reading.columns
    for name, found in ((spec.text, columns.text), (spec.question, columns.question)):
        if name is not None and found is None:
            raise RowRefused(f"`{name}` is missing")
    if columns.text is None:
        raise RowRefused("has neither messages nor an answer that is known by its column's name")
    question, where = "", "the question"
    if columns.question is not None and not is_absent(record[columns.question]):
        where = f"`{columns.question}`"
        question = text_of(record[columns.question], where)
        if columns.more is not None and not is_absent(record[columns.more]):
            question += "\n" + text_of(record[columns.more], f"`{columns.more}`")
    elif columns.image is None and spec.image is not None:
        raise RowRefused(f"`{spec.image}` is missing, and nothing is asked")
    elif columns.image is None:
        raise RowRefused("has neither an image nor a question")
    elif is_absent(record[columns.image]):
        raise RowRefused(f"`{columns.image}` is empty")
    elif reading.instruction is None:
        raise RowRefused("asks nothing: say in data.instruction what is asked about the image")
    else:
        question, where = reading.instruction, "data.instruction"
    answer = text_of(record[columns.text], f"`{columns.text}`")
    return [
        Turn(role="user", where=where, parts=parts_of(question, where, marks=True)),
        Turn(role="assistant", where=f"`{columns.text}`", parts=[answer]),
    ]


def _history(record: Mapping[str, object], columns: Columns) -> list[Turn]:
    """The turns before the question: pairs of a question and its answer, or messages."""
    history = record["history"] if columns.history is not None else None
    if is_absent(history):
        return []
    if not isinstance(history, list):
        raise RowRefused("`history` must hold pairs of a question and its answer")
    if all(isinstance(each, Mapping) for each in history):
        return [_turn(message, f"history[{number}]") for number, message in enumerate(history)]
    turns = []
    roles: Sequence[Role] = ("user", "assistant")
    for number, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != len(roles):
            raise RowRefused("`history` must hold pairs of a question and its answer")
        for role, said in zip(roles, pair, strict=True):
            where = f"history[{number}]"
            parts = parts_of(text_of(said, where), where, marks=role == "user")
            turns.append(Turn(role=role, where=where, parts=parts))
    return turns


def _with_system(
    turns: list[Turn], record: Mapping[str, object], columns: Columns, reading: Reading
) -> list[Turn]:
    """The turns after the row's system text, or the spec's if the row has none."""
    given = record[columns.system] if columns.system is not None else None
    own = None if is_absent(given) else text_of(given, f"`{columns.system}`")
    said = next((turn for turn in turns if turn.role == "system"), None)
    if said is not None:
        if own is not None and own.strip() != said.text.strip():
            raise RowRefused(f"`{columns.system}` and {said.where} are two system texts")
        return turns
    system = own or reading.system
    if system is None:
        return turns
    return [Turn(role="system", where="the system text", parts=[system]), *turns]


def text_of(value: object, where: str) -> str:
    """The value if it is a text of a length that is read. Raises RowRefused if it is not."""
    if not isinstance(value, str):
        raise RowRefused(f"{where} must be text, found {type(value).__name__}")
    if len(value) > MAX_TEXT:
        raise RowRefused(f"{where} has {len(value)} characters, more than {MAX_TEXT}")
    return value
