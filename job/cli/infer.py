"""`job infer`: one question, one answer, from what a run left at its output."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from job.artifacts import reader
from job.artifacts.records import STAGES, read_stage
from job.errors import DataError, InputError, MissingInputError, Problem, UsageError
from job.pipeline.context import RunContext
from job.prep.images import ImageRefused, inspect
from job.prep.rows import EncodedImage, Message, Part, Row
from job.prep.shards import Rows, order_file
from job.prep.turn_parts import IMAGE_PLACEHOLDER
from job.spec.foreign_names import nearest
from job.spec.load import LoadedSpec

Weights = Literal["base", "adapter", "merged"]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks."""

    images: tuple[Path, ...] = ()
    """In the order in which the model sees them."""
    question: str | None = None
    """In place of the spec's instruction."""
    system: str | None = None
    row: str | None = None
    """A held-out row's id, in place of all of these."""


class Stream:
    """What `generate` calls with each token, as a streamer of Transformers.

    Theirs holds text back up to the next space, which a formula may not have at all.
    """

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        self._decode, self._write = decode, write
        self._tokens: list[int] | None = None  # none before the prompt, which comes first
        self._written = ""

    def put(self, tokens: Any) -> None:
        """Takes the prompt, of shape (1, T), then each new token, of shape (1,)."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += tokens.tolist()
        self._show(self._text().removesuffix("\ufffd"))  # half a character may become a whole one

    def end(self) -> None:
        self._show(self._text())

    def _text(self) -> str:
        return self._decode(self._tokens or []).strip()

    def _show(self, text: str) -> None:
        self._write(text[len(self._written) :])
        self._written = text


def infer(
    loaded: LoadedSpec,
    asked: Asked,
    weights: str,
    *,
    seed: int | None,
    write: Callable[[str], object],
) -> None:
    """Answers what is asked; a held-out row's answer is followed by its label.

    `write` is given the answer piece by piece as it is made; `seed` decides what is sampled. Raises
    InputError if images, the row or the weights are missing, DataError for an image that cannot be
    read, and UsageError if nothing is asked.
    """
    if weights not in ("base", "adapter", "merged"):
        raise UsageError("--weights", "must be base, adapter or merged", value=weights)
    stages = RunContext(loaded, "infer")
    if asked.row is None:
        system = loaded.spec.data.system if asked.system is None else asked.system
        row = typed(replace(asked, system=system), loaded.spec.data.question)
        prompt, label = row.messages, None
    else:
        row = held_out(stages, asked)
        prompt, label = row.prompt, row.answer
    model, family = _model(stages, weights)
    from transformers import set_seed

    from job.evaluation.generate import generate

    if seed is not None:
        set_seed(seed)
    generation = loaded.spec.eval.generation
    if generation.max_new_tokens == "auto":
        generation = replace(generation, max_new_tokens=_longest(stages))
    encoded = family.encode_prompt(
        row.id, prompt, row.images, enable_thinking=generation.enable_thinking
    )

    def decode(tokens: list[int]) -> str:
        return str(family.processor.tokenizer.decode(tokens, skip_special_tokens=True))

    write("answer: " if label is not None else "")
    generate(model, family, [encoded], generation, Stream(decode, write))
    write(f"\nlabel:  {label}" if label is not None else "")


def typed(asked: Asked, instruction: str | None) -> Row:
    """The question as a row to answer, its images first or where `<image>` stands.

    Raises InputError or DataError for images that are not there or no images, and UsageError if
    there is no question.
    """
    if not asked.images and asked.question is None:
        raise UsageError(
            "--image",
            "nothing is asked",
            fix="name an image, write --question for text alone, or --row for a held-out row",
        )
    question = instruction if asked.question is None else asked.question
    if not question:
        raise UsageError(
            "--question",
            "is needed: the spec has no data.instruction to ask",
            fix='say what to ask about the image: --question "…"',
        )
    images = _read(asked.images)
    turns = [Message(role="user", parts=_parts(question, len(images)))]
    if asked.system is not None:
        turns.insert(0, Message(role="system", parts=(Part(text=asked.system),)))
    row_id = ", ".join(map(str, asked.images)) or "--question"
    return Row(id=row_id, messages=tuple(turns), images=images)


def _parts(question: str, images: int) -> tuple[Part, ...]:
    texts = question.split(IMAGE_PLACEHOLDER)
    if images == 0 or len(texts) == 1:
        return (*(Part(image=number) for number in range(images)), Part(text=question))
    if len(texts) - 1 != images:
        raise UsageError(
            "--question",
            f"has {len(texts) - 1} {IMAGE_PLACEHOLDER} for {images} images",
            fix=f"write {IMAGE_PLACEHOLDER} once for each --image, or not at all",
        )
    parts: list[Part] = []
    for number, text in enumerate(texts):
        parts += [Part(image=number - 1)] if number else []
        parts += [Part(text=text)] if text.strip() else []
    return tuple(parts)


def _read(paths: tuple[Path, ...]) -> tuple[EncodedImage, ...]:
    """The images; all that are not there, or else cannot be read, are named at once."""
    found: list[EncodedImage] = []
    missing: list[Problem] = []
    refused: list[Problem] = []
    for path in paths:
        try:
            found.append(inspect(path.read_bytes()))
        except FileNotFoundError:
            fix = "name an image on this machine"
            missing.append(Problem("--image", "there is no such file", str(path), fix))
        except (ImageRefused, OSError) as error:
            refused.append(Problem("--image", str(error), str(path), "use a PNG or JPEG"))
    if missing:
        raise InputError.from_problems([*missing, *refused])
    if refused:
        raise DataError.from_problems(refused)
    return tuple(found)


def held_out(stages: RunContext, asked: Asked) -> Row:
    """The held-out row of that id as prep left it at the output.

    Raises UsageError beside other questions, and InputError if there is no such row.
    """
    assert asked.row is not None
    if asked.images or asked.question is not None or asked.system is not None:
        raise UsageError(
            "--row",
            "has its own images, system text and question",
            value=asked.row,
            fix="leave out --image, --question and --system, or --row",
        )
    order = order_file(Path("data"), "eval").name
    folder = reader.fetch(
        stages.output.uri,
        "prep",
        "data",
        stages.cache_dir,
        stages.cache_limit,
        only=re.compile(rf"data/({re.escape(order)}|eval-.*\.arrow)"),
    )
    files = sorted(folder.glob("eval-*.arrow"))
    order_here = folder / order if (folder / order).exists() else None
    rows = Rows(files, order_here)
    ids = rows.ids()
    # `list.jsonl:7 (name)` goes by either part too.
    fits = [n for n, each in enumerate(ids) if each == asked.row] or [
        n
        for n, each in enumerate(ids)
        if asked.row in (each.partition(" (")[0], each.partition(" (")[2].removesuffix(")"))
    ]
    if len(fits) != 1:
        close = nearest(asked.row, ids)
        raise InputError(
            "--row",
            f"{len(fits)} held-out rows go by this id" if fits else "no held-out row has this id",
            value=asked.row,
            fix=f"{f'try {close!r}; ' if close else ''}eval/predictions.jsonl at the output has "
            "the ids",
        )
    row: Row = rows[fits[0]]
    return row


def _longest(stages: RunContext) -> int:
    """What `max_new_tokens: auto` came to when the run was evaluated, if it was."""
    from job.evaluation.answer_lengths import DEFAULT

    with suppress(MissingInputError):
        record = read_stage(stages.output.at(STAGES, "eval.json"))
        return int(record.summary.get("max_new_tokens", DEFAULT))
    return DEFAULT


def _model(stages: RunContext, weights: str) -> tuple[Any, Any]:
    if weights == "base":
        return stages.models.base(), stages.family
    stage = "train" if weights == "adapter" else "export"
    adapted = weights == "adapter" and stages.spec.lora.method == "lora"
    folder = "adapter" if adapted else "merged" if weights == "merged" else "weights"
    found = reader.fetch(stages.output.uri, stage, folder, stages.cache_dir, stages.cache_limit)
    if adapted:
        return stages.engine.load_adapter(stages.models.base(), found), stages.family
    family = stages.bind(found)
    return stages.engine.load(family), family
